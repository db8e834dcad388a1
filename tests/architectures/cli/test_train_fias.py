"""``trifuse train fias``: the defaults of layouts, its options, repeats, and a report on a phantom abdomen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import run_main
from decision_rows import decisions_of_report

from trifuse.architectures.cli.main import main
from trifuse.architectures.storage.record import write_record


def test_one_command_leads_from_a_cohort_to_a_report(abdomen_run):
    report = (abdomen_run / "report.md").read_text()
    assert report.startswith("# FIAS (nano) on abdomen")
    assert "DSC (strict) | HD95, voxels (strict) | DSC (transunet)" in report
    assert "Paper-reported: Synapse" in report
    run = json.loads((abdomen_run / "run.json").read_text())
    assert run["recipe"]["warmup_epochs"] == 0  # a constant schedule does not warm up
    assert run["recipe"]["seed"] == 2222
    assert run["config"]["data"]["augment"] == "transunet"
    assert run["config"]["data"]["preprocessing"]["intensity"] == "as_is"
    decided = decisions_of_report(report)
    assert decided["Epochs"][1:3] == ["1", "default"]
    assert decided["Batch size"] == ["2", "8", "**paper**, default", "`training.batch_size`"]
    assert decided["Split"][1:3] == ["the cohort's own", ""]
    assert decided["Intensities"][1:3] == ["as_is", ""]
    assert decided["Best epoch by"][1:3] == ["last", ""]  # for no case validates
    assert "Best epoch on" not in decided


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
        (["--image-size", "0"], "image_size must be 1 to 65536 pixels, got 0"),
        (["--image-size", "-32"], "image_size must be 1 to 65536 pixels, got -32"),
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


def test_a_window_is_one_word_for_two_fields(abdomen, tmp_path, monkeypatch):
    recipes = []
    monkeypatch.setattr(
        "trifuse.architectures.runs.pipeline.train", lambda recipe, out, **options: recipes.append(recipe)
    )
    assert main(["train", "fias", str(abdomen), "--out", str(tmp_path), "--window", "-125", "275"]) == 0
    preprocessing = recipes[0].data.preprocessing
    assert (preprocessing.intensity, preprocessing.window) == ("window", (-125.0, 275.0))


def test_what_is_advised_for_voxels_that_are_no_numbers_is_an_option_of_training(abdomen, tmp_path, monkeypatch):
    recipes = []
    monkeypatch.setattr(
        "trifuse.architectures.runs.pipeline.train", lambda recipe, out, **options: recipes.append(recipe)
    )
    assert main(["train", "fias", str(abdomen), "--out", str(tmp_path), "--nonfinite", "median"]) == 0
    assert recipes[0].data.preprocessing.nonfinite == "median"


@pytest.mark.parametrize(("words", "epochs"), [([], 400), (["--epochs", "7"], 7), (["--set", "training.epochs=9"], 9)])
def test_acdc_is_trained_for_longer_unless_said_otherwise(tmp_path, monkeypatch, words, epochs):
    (tmp_path / "patient001").mkdir()
    (tmp_path / "patient001" / "Info.cfg").write_text("ED: 1\nES: 8\n")
    recipes = []
    monkeypatch.setattr(
        "trifuse.architectures.runs.pipeline.train", lambda recipe, out, **options: recipes.append(recipe)
    )
    assert main(["train", "fias", str(tmp_path), "--out", str(tmp_path / "out"), *words]) == 0
    assert recipes[0].training.epochs == epochs


@pytest.mark.parametrize("described", [{"recipe": {"epochs": 4}}, {"repeated": {"training": {"epochs": 4}}}])
@pytest.mark.parametrize(
    ("words", "epochs"),
    [(["--resume"], 4), (["--force-resume"], 4), (["--resume", "--epochs", "6"], 6), (["--overwrite"], 300)],
)
def test_t13_who_resumes_without_a_number_of_epochs_means_that_of_the_run(
    abdomen, tmp_path, monkeypatch, described, words, epochs
):
    write_record(tmp_path / "run.json", described)
    recipes = []
    for name in ("pipeline.train", "repeats.train_repeats"):
        monkeypatch.setattr(
            f"trifuse.architectures.runs.{name}", lambda recipe, *given, **options: recipes.append(recipe)
        )
    repeats = ["--repeats", "2"] if "repeated" in described else []
    assert main(["train", "fias", str(abdomen), "--out", str(tmp_path), *repeats, *words]) == 0
    assert recipes[0].training.epochs == epochs


def test_repeats_and_their_report(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "trifuse.architectures.runs.repeats.train_repeats",
        lambda recipe, out, repeats, **options: asked.append((out, repeats, options["resume"])),
    )
    assert main(["train", "fias", str(tmp_path), "--out", "x", "--layout", "plain", "--repeats", "5", "--resume"]) == 0
    assert asked == [(Path("x"), 5, True)]
