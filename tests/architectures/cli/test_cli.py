"""The command: words, suggestions, exit codes, and the whole way on a phantom."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trifuse.architectures.cli import doctor
from trifuse.architectures.cli.main import build_parser, main
from trifuse.architectures.data.layouts.split import write_split
from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom
from trifuse.architectures.data.volumes.nifti import read_image, read_labels, write_labels
from trifuse.kernels.gpu import tuning

TRAINING = [
    *("--variant", "tiny", "--image-size", "56", "--epochs", "2", "--batch-size", "4", "--lr", "3e-3"),
    *("--set", "network.channels=[8,8,8,4]", "--set", "network.bottleneck_dim=8", "--set", "training.warmup_epochs=0"),
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_split(folder / "split.json", write_left_atrium_phantom(folder, cases=4, size=(24, 24, 4)))
    return folder


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert (
        main(["train", "dino_unet", str(cohort), "--out", str(out), "--split", str(cohort / "split.json"), *TRAINING])
        == 0
    )
    return out


def run_main(words: list[object], capsys) -> tuple[int, str, str]:
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_one_command_leads_from_a_cohort_to_a_report(finished):
    report = (finished / "report.md").read_text()
    assert report.startswith("# DINO-UNet (tiny) on cohort")
    assert "DSC" in report
    assert "Empty masks `strict`" in report
    assert "Paper-reported" in report
    for name in ("run.json", "log.csv", "split.json", "best/model.safetensors", "last/model.safetensors",
                 "test_cases.csv", "test_slices_cases.csv", "figures/curves.png", "figures/block_weights.png",
                 "figures/test/overlays.png"):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    rows = list(csv.DictReader((finished / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert sum(float(rows[-1][f"weight_block_{i}"]) for i in range(4)) == pytest.approx(1, abs=1e-5)


def test_predictions_lie_on_the_native_grid(finished, cohort):
    predicted = sorted((finished / "predictions" / "test").glob("*.nii.gz"))
    assert [path.name for path in predicted] == ["train_4.nii.gz"]
    image = read_image(cohort / "train_data" / "train_4" / "enhanced.nii.gz")
    labels = read_labels(predicted[0], like=image)
    assert labels.voxels.shape == image.voxels.shape
    assert (labels.geometry.affine == image.geometry.affine).all()


def test_predict_evaluate_and_compare(finished, cohort, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for n in (3, 4):
        shutil.copy(cohort / "train_data" / f"train_{n}" / "enhanced.nii.gz", images / f"train_{n}.nii.gz")
    labels = tmp_path / "labels"
    assert run_main(["predict", finished, images, "--out", labels], capsys)[0] == 0
    assert (labels / "train_4.nii.gz").read_bytes() == (finished / "predictions/test/train_4.nii.gz").read_bytes()

    table = tmp_path / "scores.csv"
    cases = ["--cases", "train_3", "train_4"]
    code, output, _ = run_main(["evaluate", labels, cohort, "--out", table, *cases], capsys)
    assert code == 0
    assert "left atrium" in output
    with (finished / "test_cases.csv").open() as one, table.open() as two:
        kept = {row["case_id"]: row for row in csv.DictReader(two)}
        (expected,) = csv.DictReader(one)
    assert kept["train_4"]["dsc"] == expected["dsc"]

    (labels / "train_3.nii.gz").unlink()
    code, _, errors = run_main(["evaluate", labels, cohort, "--out", tmp_path / "two.csv", *cases], capsys)
    assert code == 3
    assert "train_3 (missing prediction)" in errors

    code, output, _ = run_main(["compare", finished, finished, "--out", tmp_path / "comparison.csv"], capsys)
    assert code == 0
    assert "left atrium" in output
    assert (tmp_path / "comparison.csv").exists()


def test_one_file_is_predicted_as_well(finished, cohort, tmp_path, capsys):
    image = cohort / "train_data" / "train_4" / "enhanced.nii.gz"
    assert (
        run_main(["predict", finished / "best", image, "--out", tmp_path / "o", "--image-size", "56"], capsys)[0] == 0
    )
    assert [path.name for path in (tmp_path / "o").glob("*.nii.gz")] == ["enhanced.nii.gz"]


def test_l4_an_existing_run_is_refused_resumed_or_overwritten(finished, cohort, capsys, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    words = ["train", "dino_unet", cohort, "--out", out, "--split", cohort / "split.json", *TRAINING]
    before = (out / "report.md").read_bytes()
    code, _, errors = run_main(words, capsys)
    assert (code, (out / "report.md").read_bytes()) == (2, before)
    assert "--resume" in errors
    assert run_main([*words, "--resume"], capsys)[0] == 0
    code, _, errors = run_main([*words, "--resume", "--lr", "1e-2"], capsys)
    assert code == 2
    assert "recipe.lr: 0.003 -> 0.01" in errors
    (out / "mark").touch()
    assert run_main([*words, "--overwrite", "--epochs", "1"], capsys)[0] == 0
    assert not (out / "mark").exists()
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("three years of work")
    code, _, errors = run_main([*words[:4], stranger, *words[5:], "--overwrite"], capsys)
    assert (code, (stranger / "thesis.txt").exists()) == (2, True)
    assert "holds no run of trifuse" in errors


def test_l4_a_run_that_failed_before_it_began_may_be_overwritten(cohort, capsys, tmp_path):
    words = ["train", "dino_unet", cohort, "--out", tmp_path / "run", "--split", cohort / "split.json", *TRAINING]
    assert run_main([*words, "--set", "network.num_classes=5"], capsys)[0] == 3
    code, _, errors = run_main(words, capsys)
    assert code == 2
    assert "a run failed there before it began; pass --overwrite" in errors
    note = tmp_path / "run" / "cache" / "note.txt"
    note.touch()
    assert run_main([*words, "--overwrite"], capsys)[0] == 2
    note.unlink()
    assert run_main([*words, "--overwrite", "--epochs", "1"], capsys)[0] == 0


def test_several_targets_make_a_network_of_as_many_classes(cohort, capsys, tmp_path):
    for number in range(1, 5):
        case = cohort / "train_data" / f"train_{number}"
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(case / "enhanced.nii.gz", tmp_path / "images" / f"c{number}.nii.gz")
        labels = read_labels(case / "atriumSegImgMO.nii.gz")
        labels.voxels[:, :, labels.voxels.shape[2] // 2 :] *= 2
        write_labels(tmp_path / "labels" / f"c{number}.nii.gz", labels.voxels, like=labels)
    out = tmp_path / "run"
    words = ["train", "dino_unet", tmp_path, "--out", out, "--target", "right=1", "--target", "left=2", *TRAINING]
    assert run_main([*words, "--val-cases", "c3", "--test-cases", "c4"], capsys)[0] == 0
    assert json.loads((out / "best" / "config.json").read_text())["config"]["num_classes"] == 3
    assert json.loads((out / "run.json").read_text())["config"]["network"]["num_classes"] == 3
    with (out / "test_cases.csv").open() as table:
        assert [row["class_name"] for row in csv.DictReader(table)][:2] == ["right", "left"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "many"], "invalid int value: 'many'\n"),
        (["--keep", "foregrund"], "did you mean foreground?\n"),
        (["--epochs"], "expected one argument\n"),
    ],
)
def test_l1_no_word_is_suggested_that_was_not_meant(words, message, capsys):
    code, _, errors = run_main(["train", "dino_unet", "cohort", "--out", "x", *words], capsys)
    assert code == 2
    assert errors.endswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean train?"),
        (["train", "dino_unte"], "did you mean dino_unet?"),
        (["train", "dino_unet", "cohort", "--out", "x", "--epohcs", "3"], "did you mean --epochs?"),
        (["train", "dino_unet", "cohort", "--out", "x", "--epochs", "many"], "invalid int value: 'many'"),
        (["train", "dino_unet", "cohort", "--out", "x", "--set", "training.lrr=1"], "did you mean 'lr'?"),
        (["train", "dino_unet", "cohort", "--out", "x", "--set", "trainig.lr=1"], "did you mean 'training'?"),
        (["train", "dino_unet", "cohort", "--out", "x", "--set", "training.lr"], "expected FIELD=VALUE"),
        (["train", "dino_unet", "cohort", "--out", "x", "--lr", "-1"], "lr = -1.0; allowed: a number > 0"),
        (["train", "dino_unet", "cohort", "--out", "x", "--lr", "nan"], "lr = nan; allowed: a number > 0"),
        (["train", "dino_unet", "cohort", "--out", "x", "--set", "network.norm=layer"], "'norm': expected one of"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_l1_l2_wrong_words_are_named_with_a_suggestion(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_main(words, capsys)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert message in errors


def test_l3_a_broken_configuration_is_named_with_its_line(tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text("[training]\nlr = = 3\n")
    code, _, errors = run_main(["train", "dino_unet", "s", "--out", tmp_path / "x", "--config", config], capsys)
    assert code == 2
    assert f"{config}: expected TOML, got Invalid value (at line 2, column 6)" in errors


def test_configuration_file_words_and_settings_in_that_order(tmp_path):
    from trifuse.architectures.dino_unet.train import DinoUNetRecipe
    from trifuse.architectures.runs.recipes import recipe_from

    config = tmp_path / "run.toml"
    config.write_text('[data]\nroot = "cohort"\n[training]\nlr = 1e-3\nepochs = 7\nbatch_size = 3\n')
    recipe = recipe_from(
        DinoUNetRecipe, config, {"training.epochs": 8, "training.batch_size": 4}, ["training.epochs=9"]
    )
    training = recipe.training
    assert (training.lr, training.epochs, training.batch_size, training.warmup_epochs) == (1e-3, 9, 4, 5)
    assert (recipe.data.root, recipe.network.variant) == ("cohort", "giant")


def test_l7_a_gpu_that_is_not_there(cohort, tmp_path, capsys):
    words = ["train", "dino_unet", cohort, "--out", tmp_path / "x", "--split", cohort / "split.json", *TRAINING]
    code, _, errors = run_main([*words, "--device", "cuda:99"], capsys)
    assert code == 2
    assert "needs GPU number 99; found" in errors


def test_l8_no_case_matches(cohort, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    code, _, errors = run_main(["data", "check", tmp_path], capsys)
    assert code == 3
    assert "images/*.nii.gz" in errors
    words = ["train", "dino_unet", cohort, "--out", tmp_path / "x", "--test-cases", "patient*", *TRAINING]
    code, _, errors = run_main(words, capsys)
    assert code == 3
    assert "0 cases that match 'patient*'" in errors


def test_data_check_lists_everything_and_fails(cohort, tmp_path, capsys):
    folder = shutil.copytree(cohort, tmp_path / "cohort")
    assert run_main(["data", "check", folder], capsys)[0] == 0
    (folder / "train_data/train_1/enhanced.nii.gz").write_bytes(b"")
    (folder / "train_data/train_2/atriumSegImgMO.nii.gz").unlink()
    code, output, _ = run_main(["data", "check", folder], capsys)
    assert code == 3
    assert "train_1/enhanced.nii.gz: content: expected a gzip file, by its name, got an empty file" in output
    assert "train_2/atriumSegImgMO.nii.gz" in output


def test_strict_check_counts_warnings(cohort, tmp_path, capsys):
    words = ["data", "check", shutil.copytree(cohort, tmp_path / "cohort")]
    assert run_main([*words, "--strict"], capsys)[0] == 0
    labels = tmp_path / "cohort/train_data/train_1/atriumSegImgMO.nii.gz"
    truth = read_labels(labels)
    write_labels(labels, truth.voxels * 0, like=truth)
    code, output, _ = run_main(words, capsys)
    assert (code, "warning: " in output) == (0, True)
    assert run_main([*words, "--strict"], capsys)[0] == 3


def test_c1_c7_a_model_that_is_none(tmp_path, cohort, capsys):
    image = cohort / "train_data" / "train_4" / "enhanced.nii.gz"
    code, _, errors = run_main(["predict", tmp_path, image, "--out", tmp_path / "o"], capsys)
    assert code == 4
    assert "config.json" in errors
    config = {"format": "trifuse", "schema_version": 1, "architecture": "unet9000", "config": {}, "sha256": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, errors = run_main(["predict", tmp_path, image, "--out", tmp_path / "o"], capsys)
    assert code == 4
    assert "'unet9000'" in errors


def test_doctor_says_what_was_tuned_and_whether_a_kernel_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_remembered", None)
    monkeypatch.setattr(doctor, "_gpus", lambda: [torch.device("cpu")])  # the trial itself, on a CPU
    output = run_main(["doctor"], capsys)[1]
    assert f"choices kept in {tmp_path}/tuning.json: none; trifuse.kernels.warm_up" in output
    assert "no kernel runs on cpu: CPU tensors use plain PyTorch" in output
    monkeypatch.setattr(tuning, "_remembered", {"a": {"threads": 64}})
    monkeypatch.setattr(doctor, "default_backend", lambda *_: ("triton", ""))
    output = run_main(["doctor"], capsys)[1]
    assert f"choices kept in {tmp_path}/tuning.json: 1\n" in output
    assert "a kernel ran on cpu" in output


def test_doctor_names_every_operator_and_its_reason(capsys):
    code, output, _ = run_main(["doctor", "--json"], capsys)
    findings = json.loads(output)
    assert code == 0
    assert {row["operator"] for row in findings["operators"]} >= {"weighted_block_fusion", "memory_efficient_attention"}
    assert all(row["reason"] for row in findings["operators"])
    assert "weighted_block_fusion" in run_main(["doctor"], capsys)[1]


def test_traceback_is_shown_on_request_alone(tmp_path, capsys):
    words = ["data", "check", str(tmp_path / "nowhere")]
    code, _, errors = run_main(words, capsys)
    assert code == 3
    assert "Traceback" not in errors
    with pytest.raises(Exception, match="nowhere"):
        main([*words, "--traceback"])


def test_l12_help_and_version_import_nothing_heavy():
    script = """
import sys, time
start = time.perf_counter()
from trifuse.architectures.cli import main
for words in (["--version"], ["--help"], ["train", "dino_unet", "--help"]):
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert time.perf_counter() - start < 0.3, time.perf_counter() - start
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr


def test_t5_sigterm_while_training_exits_with_75_and_resumes(cohort, tmp_path):
    out = tmp_path / "run"
    words = ["train", "dino_unet", str(cohort), "--out", str(out), "--split", str(cohort / "split.json"), *TRAINING]
    words += ["--epochs", "500"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-m", "trifuse.architectures.dino_unet.train", *words[2:]],
                             env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    for line in child.stdout:
        if line.startswith("epoch 2"):
            child.terminate()
            break
    rest = child.stdout.read()
    assert child.wait(60) == 75, rest
    assert "resume to continue" in rest
    steps = json.loads((out / "last" / "training_state.json").read_text())
    assert steps


def test_two_processes_take_the_steps_of_one(cohort, tmp_path):
    options = [
        str(cohort),
        "--split",
        str(cohort / "split.json"),
        *TRAINING,
        "--set",
        "network.norm=group",
        "--cache-features",
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "trifuse.architectures.dino_unet.train", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--out", str(tmp_path / "two")]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("report: ") == 1
    assert main(["train", "dino_unet", *options, "--out", str(tmp_path / "one")]) == 0
    one, two = (list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("one", "two"))
    for name in ("loss", "gradient_norm", "val_dice", "weight_block_3"):
        assert [float(row[name]) for row in two] == pytest.approx([float(row[name]) for row in one], rel=1e-4), name


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m trifuse.architectures.cli.main doctor | head -1; exit ${{PIPESTATUS[0]}}"
    child = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0
    assert "Traceback" not in child.stderr


def test_every_command_has_help():
    parser = build_parser()
    assert "exit codes: 0 ok" in parser.format_help()


def test_converted_weights_bring_their_own_shape(cohort, tmp_path, capsys):
    from safetensors.torch import save_file

    from trifuse.architectures.dino_unet import DinoUNet, DinoV2Encoder

    encoder = DinoV2Encoder("tiny", num_registers=4, pos_mode="antialias")
    save_file(encoder.state_dict(), tmp_path / "published.safetensors")
    words = ["convert", "dinov2", tmp_path / "published.safetensors"]
    assert run_main(words, capsys)[0] == 0
    assert (tmp_path / "published" / "model.safetensors").exists()
    words += ["--out", tmp_path / "encoder"]
    code, output, _ = run_main(words, capsys)
    assert code == 0
    assert "DinoV2Encoder('tiny', num_registers=4, pos_mode='antialias')" in output
    code, _, errors = run_main(words, capsys)
    assert code == 2
    assert "exists already" in errors

    train = ["train", "dino_unet", cohort, "--out", tmp_path / "run", "--split", cohort / "split.json", *TRAINING[2:]]
    assert run_main([*train, "--encoder", tmp_path / "encoder", "--epochs", "1"], capsys)[0] == 0
    trained = DinoUNet.from_pretrained(tmp_path / "run" / "best").encoder
    for name, value in encoder.state_dict().items():
        assert (trained.state_dict()[name] == value).all(), name
    assert "weights of encoder, frozen" in (tmp_path / "run" / "report.md").read_text()
    code, _, errors = run_main([*train[:4], tmp_path / "x", "--encoder", tmp_path / "nowhere"], capsys)
    assert code == 4
    assert "nowhere: not found" in errors


def test_mistyped_folders_are_refused_before_any_work(finished, cohort, tmp_path, capsys):
    code, _, errors = run_main(["evaluate", tmp_path / "nowhere", cohort, "--out", tmp_path / "x.csv"], capsys)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "is no folder" in errors
    predictions = finished / "predictions" / "test"
    code, _, errors = run_main(["evaluate", predictions, cohort, "--out", tmp_path / "a" / "x.csv"], capsys)
    assert code == 2
    assert "make it first" in errors
    table = finished / "test_cases.csv"
    code, _, errors = run_main(["compare", table, table, "--out", table], capsys)
    assert code == 2
    assert "exists already" in errors


def test_a_short_run_warms_up_for_a_tenth_of_it(cohort, tmp_path):
    words = ["train", "dino_unet", str(cohort), "--split", str(cohort / "split.json"), *TRAINING[:-2]]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe"]["warmup_epochs"] == pytest.approx(0.2)
