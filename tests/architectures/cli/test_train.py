"""``trifuse train`` from a cohort to a report, on left atria: what it leaves, what it refuses, what goes on."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
from command import ATRIA_TRAINING, run_main
from decision_rows import decisions_of_report
from made_ecg import median
from torch import nn

from trifuse.architectures.cli.main import main
from trifuse.architectures.data.volumes.nifti import read_image, read_labels, write_labels
from trifuse.architectures.dino_unet import DinoUNetConfig
from trifuse.architectures.dino_unet.train import DinoUNetRecipe
from trifuse.architectures.runs import pipeline
from trifuse.architectures.runs.pipeline import build, with_classes
from trifuse.architectures.runs.recipes import DataRecipe, RecipeError
from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.taff_unet import pretrain
from trifuse.kernels import DataError, errors


def instead(words, option, value):
    """The same words with another value of one option."""
    at = words.index(option) + 1
    return [*words[:at], value, *words[at + 1 :]]


def test_one_command_leads_from_a_cohort_to_a_report(atria_run):
    report = (atria_run / "report.md").read_text()
    assert report.startswith("# DINO-UNet (tiny) on cohort")
    assert "DSC" in report
    assert "Empty masks `strict`" in report
    assert "| Augmentation | none |" in report
    assert re.search(
        r"\| Weights of the blocks \| within \S+ % of uniform, moved by at most \S+ % of it; all blocks", report
    )
    assert "Paper-reported" in report
    for name in ("run.json", "start.json", "log.csv", "split.json", "best/model.safetensors", "last/model.safetensors",
                 "test_cases.csv", "test_slices_cases.csv", "figures/curves.png", "figures/block_weights.png",
                 "figures/test/overlays.png"):  # fmt: skip
        assert (atria_run / name).stat().st_size > 0, name
    rows = list(csv.DictReader((atria_run / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert sum(float(rows[-1][f"weight_block_{i}"]) for i in range(4)) == pytest.approx(1, abs=1e-5)


def test_a_report_says_what_the_run_settled_and_where_it_differs_from_the_paper(atria_run):
    decided = decisions_of_report((atria_run / "report.md").read_text())
    assert decided["Epochs"] == ["50", "2", "**paper**, default", "`training.epochs`"]
    assert decided["Warm-up, epochs"][1:3] == ["0", "**paper**, default"]
    assert decided["Channels of the stages"] == ["not said (trifuse)", "8, 8, 8, 4", "default", "`network.channels`"]
    assert decided["Split"][1:3] == ["given", "**paper**, default"]
    assert decided["Best epoch on"][1:3] == ["validation", ""]
    assert decided["Optimiser"][1:3] == ["adamw", ""]


def test_predictions_lie_on_the_native_grid(atria_run, atria):
    predicted = sorted((atria_run / "predictions" / "test").glob("*.nii.gz"))
    assert [path.name for path in predicted] == ["train_4.nii.gz"]
    image = read_image(atria / "train_data" / "train_4" / "enhanced.nii.gz")
    labels = read_labels(predicted[0], like=image)
    assert labels.voxels.shape == image.voxels.shape
    assert (labels.geometry.affine == image.geometry.affine).all()


def test_l4_an_existing_run_is_refused_resumed_or_overwritten(atria_run, atria, capsys, tmp_path):
    out = shutil.copytree(atria_run, tmp_path / "run")
    words = ["train", "dino_unet", atria, "--out", out, "--split", atria / "split.json", *ATRIA_TRAINING]
    before = (out / "report.md").read_bytes()
    code, _, errors = run_main(words, capsys)
    assert (code, (out / "report.md").read_bytes()) == (2, before)
    assert "--resume" in errors
    assert run_main([*words, "--resume"], capsys)[0] == 0
    code, _, errors = run_main([*instead(words, "--lr", "1e-2"), "--resume"], capsys)
    assert code == 2
    assert "recipe.lr: 0.003 -> 0.01" in errors
    (out / "mark").touch()
    assert run_main([*instead(words, "--epochs", "1"), "--overwrite"], capsys)[0] == 0
    assert (out / "mark").exists()  # not the run's
    assert not (out / "replaced_run").exists()
    assert len(read_log(out / "log.csv")) == 1
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("three years of work")
    code, _, errors = run_main([*words[:4], stranger, *words[5:], "--overwrite"], capsys)
    assert (code, (stranger / "thesis.txt").exists()) == (2, True)
    assert "holds no run of trifuse" in errors


def test_l4_a_run_that_failed_before_it_began_is_begun_again(atria, capsys, tmp_path):
    words = ["train", "dino_unet", atria, "--out", tmp_path / "run", "--split", atria / "split.json", *ATRIA_TRAINING]
    assert run_main([*words, "--set", "network.num_classes=5"], capsys)[0] == 3
    note = tmp_path / "run" / "cache" / "note.txt"
    note.touch()
    assert run_main(words, capsys)[0] == 2
    note.unlink()
    assert run_main(instead(words, "--epochs", "1"), capsys)[0] == 0


def test_l4_l15_nothing_is_lost_to_a_run_that_cannot_begin(atria_run, atria, capsys, tmp_path):
    """Another study, a recipe that does not fit, a study that is the run itself: the old run is what it was."""
    out = shutil.copytree(atria_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = ["--out", out, "--split", atria / "split.json", *ATRIA_TRAINING, "--overwrite"]
    for study, further, code in (
        (tmp_path / "nowhere", (), 3),
        (atria, ("--set", "network.num_classes=5"), 3),
        (atria, ("--set", "network.top_k=99"), 2),
        (out / "predictions" / "test", (), 3),
        (atria, ("--init", out), 2),
    ):
        assert run_main(["train", "dino_unet", study, *words, *further], capsys)[0] == code, study
        after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
        assert after == {path: content for path, content in before.items() if path.name != ".lock"}


def test_c9_several_targets_make_a_network_of_as_many_classes_with_the_weights_of_another(
    atria_run, atria, capsys, tmp_path
):
    for number in range(1, 5):
        case = atria / "train_data" / f"train_{number}"
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(case / "enhanced.nii.gz", tmp_path / "images" / f"c{number}.nii.gz")
        labels = read_labels(case / "atriumSegImgMO.nii.gz")
        labels.voxels[:, :, labels.voxels.shape[2] // 2 :] *= 2
        write_labels(tmp_path / "labels" / f"c{number}.nii.gz", labels.voxels, like=labels)
    out = tmp_path / "run"
    words = ["train", "dino_unet", tmp_path, "--out", out, "--target", "right=1", "--target", "left=2", *ATRIA_TRAINING]
    words += ["--val-cases", "c3", "--test-cases", "c4", "--init", atria_run]
    code, _, errors = run_main(words, capsys)
    assert code == 4
    assert "decoder.head.weight: expected (3, 4, 3, 3), got (2, 4, 3, 3)" in errors
    assert "--reset-head" in errors
    assert run_main([*words, "--overwrite", "--reset-head"], capsys)[0] == 0
    assert decisions_of_report((out / "report.md").read_text())["Starts from weights"][1] == "run's, with another head"
    assert json.loads((out / "best" / "config.json").read_text())["config"]["num_classes"] == 3
    assert json.loads((out / "run.json").read_text())["config"]["network"]["num_classes"] == 3
    with (out / "test_cases.csv").open() as table:
        assert [row["class_name"] for row in csv.DictReader(table)][:2] == ["right", "left"]


def test_l2_a_network_that_memory_does_not_hold_is_refused(tmp_path):
    recipe = DinoUNetRecipe(DataRecipe("cohort"), DinoUNetConfig(num_classes=2**50, channels=(8, 8), top_k=2))
    with pytest.raises(RecipeError, match=r"network: more weights than memory holds .*; make it smaller"):
        build(lambda config: nn.Conv2d(8, config.num_classes, 3), recipe)


def test_one_logit_is_for_two_classes_alone():
    recipe = DinoUNetRecipe(DataRecipe("cohort"), DinoUNetConfig(num_classes=1))
    assert with_classes(recipe, 2, sigmoid=True) == recipe
    for classes, sigmoid in ((2, False), (3, True)):
        with pytest.raises(DataError, match=f"expected 1, the network's num_classes, got {classes} with the"):
            with_classes(recipe, classes, sigmoid=sigmoid)


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


def test_l7_a_gpu_that_is_not_there(atria, tmp_path, capsys, monkeypatch):
    words = ["train", "dino_unet", atria, "--out", tmp_path / "x", "--split", atria / "split.json", *ATRIA_TRAINING]
    for found, device, needed in ((0, "cuda", 0), (2, "cuda:99", 99)):
        monkeypatch.setattr("torch.cuda.device_count", lambda found=found: found)
        code, _, errors = run_main([*words, "--device", device], capsys)
        assert code == 2
        assert f"needs GPU number {needed}; found {found} GPUs" in errors
    assert not (tmp_path / "x").exists()


def test_l8_no_case_matches(atria, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    code, _, errors = run_main(["data", "check", tmp_path], capsys)
    assert code == 3
    assert "images/*.nii.gz" in errors
    words = ["train", "dino_unet", atria, "--out", tmp_path / "x", "--test-cases", "patient*", *ATRIA_TRAINING]
    code, _, errors = run_main(words, capsys)
    assert code == 3
    assert "0 cases that match 'patient*'" in errors


def test_a_short_run_warms_up_for_a_tenth_of_it(atria, tmp_path):
    words = ["train", "dino_unet", str(atria), "--split", str(atria / "split.json"), *ATRIA_TRAINING[:-2]]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe"]["warmup_epochs"] == pytest.approx(0.2)


class Asked(Exception):
    """That a training was about to begin, and with which options."""


@pytest.mark.parametrize("words", [["dino_unet"], ["dino_unet", "--repeats", "2"], ["ecg"]], ids=" ".join)
def test_epochs_are_logged_where_it_is_asked_for(atria, tmp_path, monkeypatch, words):
    def ask(*_, loggers, **__):
        raise Asked(*loggers)

    monkeypatch.setattr(pipeline, "fit", ask)
    monkeypatch.setattr(pretrain, "fit", ask)
    np.save(tmp_path / "beat.npy", median())
    data = [tmp_path / "beat.npy"] if words == ["ecg"] else [atria, *ATRIA_TRAINING]
    monkeypatch.setattr(errors, "find_spec", lambda name: object())  # as if all loggers were installed
    for number, names in enumerate(([], ["tensorboard"], ["mlflow", "tensorboard", "mlflow"])):
        option = ["--log", *names] if names else []
        with pytest.raises(Asked) as caught:
            main([*map(str, ["train", *words, *data, "--out", tmp_path / str(number), *option])])
        assert [logger.name for logger in caught.value.args] == [*dict.fromkeys(names)]


def test_l6_a_logger_that_is_not_installed_is_named_before_anything_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "mlflow" else object())
    words = ["train", "dino_unet", tmp_path / "no data", "--out", tmp_path / "run", "--log", "tensorboard", "mlflow"]
    code, _, said = run_main(words, capsys)
    assert code == 2
    assert "logging to MLflow needs mlflow, which is not installed; run: pip install 'trifuse[mlflow]'" in said
    assert not (tmp_path / "run").exists()
