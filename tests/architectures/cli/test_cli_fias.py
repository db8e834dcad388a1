"""FIAS on the command line: the words, and the whole way on a phantom abdomen."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import pytest

from trifuse.architectures.cli.arguments import CONVENTIONS, DEFAULTS, VARIANTS
from trifuse.architectures.cli.main import build_parser, main
from trifuse.architectures.data.phantoms.abdomen import write_abdomen_phantom
from trifuse.architectures.data.volumes.nifti import read_image, write_image
from trifuse.architectures.dino_unet.train import DinoUNetRecipe
from trifuse.architectures.dino_unet.variants import VARIANTS as DINO_VARIANTS
from trifuse.architectures.evaluation.metrics import EMPTY_MASK_SCORES
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.fias.train import FiasRecipe
from trifuse.architectures.fias.variants import VARIANTS as FIAS_VARIANTS

TRAINING = [
    *("--label-space", "transunet9", "--variant", "nano", "--image-size", "32", "--epochs", "1", "--batch-size", "8"),
    *("--keep", "foreground", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("abdomen")
    write_abdomen_phantom(folder, cases=3, size=(48, 48, 12))
    return folder


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "fias", str(cohort), "--out", str(out), *TRAINING]) == 0
    return out


def run_main(words: list[object], capsys) -> tuple[int, str, str]:
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_the_words_of_the_command_repeat_the_code():
    assert set(VARIANTS["dino_unet"]) == set(DINO_VARIANTS)
    assert set(VARIANTS["fias"]) == set(FIAS_VARIANTS)
    assert set(CONVENTIONS) == set(EMPTY_MASK_SCORES)


@pytest.mark.parametrize(("network", "kind"), [("dino_unet", DinoUNetRecipe), ("fias", FiasRecipe)])
def test_the_help_says_what_the_recipe_does(network, kind):
    said, recipe = DEFAULTS[network], kind()
    assert (said["image_size"], said["augment"]) == (str(recipe.data.preprocessing.image_size), recipe.data.augment)
    for field in ("batch_size", "lr", "seed"):
        assert said[field] == str(getattr(recipe.training, field))
    assert said["epochs"].startswith(f"{recipe.training.epochs},")
    assert said["variant"].endswith(f"else {recipe.network.variant}")


def test_one_command_leads_from_a_cohort_to_a_report(finished):
    report = (finished / "report.md").read_text()
    assert report.startswith("# FIAS (nano) on abdomen")
    assert "DSC (strict) | HD95, voxels (strict) | DSC (transunet)" in report
    assert "Paper-reported: Synapse" in report
    run = json.loads((finished / "run.json").read_text())
    assert run["recipe"]["warmup_epochs"] == 0  # a constant schedule does not warm up
    assert run["recipe"]["seed"] == 2222
    assert run["config"]["data"]["augment"] == "transunet"
    assert run["config"]["data"]["preprocessing"]["intensity"] == "as_is"


def test_predict_and_evaluate_under_two_conventions(finished, cohort, tmp_path, capsys):
    labels = tmp_path / "labels"
    assert run_main(["predict", finished, cohort, "--out", labels], capsys)[0] == 0
    (test,) = (finished / "predictions" / "test").glob("*.nii.gz")
    assert (labels / test.name).read_bytes() == test.read_bytes()
    words = ["evaluate", labels, cohort, "--label-space", "transunet9", "--cases", test.name.removesuffix(".nii.gz")]
    table = tmp_path / "scores.csv"
    code, output, _ = run_main([*words, "--out", table, "--convention", "strict", "transunet"], capsys)
    assert code == 0
    for said in ("Empty masks `strict`", "Empty masks `transunet`", "HD95, voxels (strict)", "mean of classes"):
        assert said in output
    assert " mm" not in output
    assert table.read_text() == (finished / "test_cases.csv").read_text()
    beside = tmp_path / "scores_transunet.csv"
    assert beside.read_text() == (finished / "test_transunet_cases.csv").read_text()
    table.unlink()
    code, _, errors = run_main([*words, "--out", table, "--convention", "strict", "transunet"], capsys)
    assert (code, table.exists()) == (2, False)
    assert "scores_transunet.csv exists already" in errors
    assert run_main([*words, "--out", table], capsys)[0] == 0
    assert {row.conventions.empty_masks for row in read_case_table(table)} == {"strict"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "giant"], "invalid choice: 'giant'"),
        (["--variant", "tniy"], "did you mean tiny?"),
        (["--cache-features"], "unrecognized arguments: --cache-features"),
        (["--set", "gama=0.5"], "did you mean 'gamma'?"),
        (["--set", "gamma=2"], "gamma must be in [0, 1]"),
        (["--set", "subsets=all"], "subsets"),
        (["--image-size", "100"], "multiple of 32, got 100"),
        (["--image-size", "0"], "image_size must be at least 1, got 0"),
        (["--image-size", "-32"], "image_size must be at least 1, got -32"),
        (["--repeats", "0"], "--repeats: expected a whole number of at least 1, got '0'"),
        (["--window", "3", "1"], "window"),
        (["--config", "nothere.toml"], "nothere.toml: expected a TOML file, got No such file or directory"),
        (["--set", "network.dmk_kernels=[]"], "dmk_kernels must be odd numbers, at least one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_l1_l2_wrong_words_are_named(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_main(["train", "fias", "cohort", "--out", "x", *words], capsys)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert message in errors


def test_a_window_is_one_word_for_two_fields(cohort, tmp_path, monkeypatch):
    recipes = []
    monkeypatch.setattr("trifuse.architectures.fias.train.train", lambda recipe, out, **options: recipes.append(recipe))
    assert main(["train", "fias", str(cohort), "--out", str(tmp_path), "--window", "-125", "275"]) == 0
    preprocessing = recipes[0].data.preprocessing
    assert (preprocessing.intensity, preprocessing.window) == ("window", (-125.0, 275.0))


def test_the_best_network_of_a_run_prepares_slices_as_the_run_did(finished, cohort, tmp_path, capsys):
    for folder in ("run", "best"):
        model = finished / "best" if folder == "best" else finished
        assert run_main(["predict", model, cohort, "--out", tmp_path / folder], capsys)[0] == 0
    for path in (tmp_path / "run").iterdir():
        assert path.read_bytes() == (tmp_path / "best" / path.name).read_bytes()


def test_a_window_brings_other_images_to_the_values_of_the_training(finished, cohort, tmp_path, capsys):
    """Of Synapse's values, 0 to 1, and of the same in Hounsfield units, written as NIfTI."""
    words = ["data", "convert", cohort, "--label-space", "transunet9", "--to", "nnunet", "--out", tmp_path / "raw"]
    assert run_main(words, capsys)[0] == 0
    for path in (tmp_path / "raw").glob("images*/*"):
        image = read_image(path)
        write_image(path, image.voxels * 400 - 125, like=image)
    (test,) = (finished / "predictions" / "test").glob("*.nii.gz")
    for options in ((), ("--window", "-125", "275")):
        out = tmp_path / f"labels{len(options)}"
        code, _, errors = run_main(["predict", finished, tmp_path / "raw", "--out", out, *options], capsys)
        assert (code, "pass --window -125 275" in errors) == (0, not options)
        used = json.loads((out / "predictions.json").read_text())["preprocessing"]
        assert (used["intensity"], used["window"]) == (("window", [-125, 275]) if options else ("as_is", None))
    assert (nibabel.load(out / test.name).get_fdata() == nibabel.load(test).get_fdata()).mean() > 0.99
    words = ["predict", finished, tmp_path / "raw", "--out", tmp_path / "x", "--window", "3", "1"]
    code, _, errors = run_main(words, capsys)
    assert (code, "window: expected its lowest and highest value" in errors) == (2, True)


@pytest.mark.parametrize("device", ["gpu", "cuda:first", "cpu:0"])
def test_devices_that_there_are_none_of(device, finished, cohort, tmp_path, capsys):
    code, _, errors = run_main(["predict", finished, cohort, "--out", tmp_path / "x", "--device", device], capsys)
    assert (code, f"unknown device '{device}'; use one of auto, cpu, cuda and cuda:<index>" in errors) == (2, True)


def test_folders_that_were_not_meant(finished, cohort, tmp_path, capsys):
    words = ["evaluate", finished, cohort, "--label-space", "transunet9", "--out", tmp_path / "scores.csv"]
    code, _, errors = run_main(words, capsys)
    assert (code, list(tmp_path.iterdir())) == (3, [])
    assert f"got none; those of this run lie in {finished / 'predictions' / 'test'}" in errors
    (tmp_path / "run_1").mkdir()
    code, _, errors = run_main(["compare", finished, tmp_path], capsys)
    assert (code, "choose one of its runs: run_1" in errors) == (3, True)
    code, _, errors = run_main(["compare", finished, tmp_path / "gone"], capsys)
    assert (code, "a run's folder, got No such file or directory" in errors) == (3, True)
    code, _, errors = run_main(["train", "fias", cohort, "--out", cohort, *TRAINING], capsys)
    assert (code, "is not empty; choose another folder, new or empty" in errors) == (2, True)
    code, _, errors = run_main(
        ["train", "fias", cohort, "--out", finished, *TRAINING, "--repeats=2", "--resume"], capsys
    )
    assert (code, "holds a single run, and cannot hold repeated runs as well" in errors) == (2, True)


@pytest.mark.parametrize("option", ["--batch-size", "--image-size"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_what_is_counted_is_at_least_one(option, value, finished, cohort, tmp_path, capsys):
    code, _, errors = run_main(["predict", finished, cohort, "--out", tmp_path / "x", option, value], capsys)
    assert (code, f"{option}: expected a whole number of at least 1, got '{value}'" in errors) == (2, True)


@pytest.mark.parametrize(("words", "epochs"), [([], 400), (["--epochs", "7"], 7), (["--set", "training.epochs=9"], 9)])
def test_acdc_is_trained_for_longer_unless_said_otherwise(tmp_path, monkeypatch, words, epochs):
    (tmp_path / "patient001").mkdir()
    (tmp_path / "patient001" / "Info.cfg").write_text("ED: 1\nES: 8\n")
    recipes = []
    monkeypatch.setattr("trifuse.architectures.fias.train.train", lambda recipe, out, **options: recipes.append(recipe))
    assert main(["train", "fias", str(tmp_path), "--out", str(tmp_path / "out"), *words]) == 0
    assert recipes[0].training.epochs == epochs


def test_repeats_and_their_report(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "trifuse.architectures.fias.train.train_repeats",
        lambda recipe, out, repeats, **options: asked.append((out, repeats, options["resume"])),
    )
    assert main(["train", "fias", str(tmp_path), "--out", "x", "--layout", "plain", "--repeats", "5", "--resume"]) == 0
    assert asked == [(Path("x"), 5, True)]


def test_demo_and_ablation_are_called_with_their_words(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "trifuse.architectures.fias.demo.run_demo", lambda out, **options: asked.append((out, options["seed"]))
    )
    assert main(["demo", "fias", "--seed", "4"]) == 0

    def ablate(out, *, seeds, epochs, cases, command):
        asked.append((seeds, epochs, cases, command))
        (tmp_path / "table.md").write_text("| a |")
        return tmp_path / "table.md"

    monkeypatch.setattr("trifuse.architectures.fias.ablate.ablate", ablate)
    words = ["ablate", "fias", "--out", "x", "--seeds", "2", "--epochs", "3", "--cases", "5"]
    assert main(words) == 0
    assert asked == [(Path("demo/fias"), 4), (2, 3, 5, ["trifuse", *words])]


def test_ctrl_c_shows_no_traceback(monkeypatch, capsys):
    def stop(arguments, words):
        raise KeyboardInterrupt

    monkeypatch.setattr("trifuse.architectures.cli.commands.demo_fias", stop)
    assert run_main(["demo", "fias"], capsys) == (130, "", "trifuse: stopped by Ctrl-C\n")


def test_l12_help_is_free_of_torch():
    script = """
import sys
from trifuse.architectures.cli import main
for words in (["train", "fias", "--help"], ["demo", "fias", "--help"], ["ablate", "fias", "--help"]):
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60)


def test_the_module_is_the_command_and_runs_under_torchrun(cohort, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(cohort), "--out", str(tmp_path / "two"), *TRAINING, "--repeats", "2"]
    command = [sys.executable, *launch, "-m", "trifuse.architectures.fias.train", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("report: ") == 1
    for k in (1, 2):
        assert len(list(csv.DictReader((tmp_path / "two" / f"run_{k}" / "log.csv").open()))) == 1
    assert "over 2 runs" in (tmp_path / "two" / "report.md").read_text()


def test_every_network_can_be_trained_shown_and_ablated():
    for words in (["train"], ["demo"], ["ablate"]):
        for network in VARIANTS:
            with pytest.raises(SystemExit) as stop:
                build_parser().parse_args([*words, network, "--help"])
            assert stop.value.code == 0
