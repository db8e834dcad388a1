"""Wrong arguments: what is meant is suggested, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import run_main

from trifuse.architectures.cli.arguments import given_values
from trifuse.architectures.cli.main import build_parser


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
        (["train", "dino_unet", "cohort", "--out", "x", "--lr", "nan"], "'lr': expected a finite number, got nan"),
        (["train", "dino_unet", "cohort", "--out", "x", "--set", "network.norm=layer"], "'norm': expected one of"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_l1_l2_wrong_words_are_named_with_a_suggestion(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_main(words, capsys)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert message in errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nepohcs = 3\n", "training.epohcs: there is no field 'epohcs'; did you mean 'epochs'?"),
        ("[trainig]\nepochs = 3\n", "trainig.epochs: there is no section 'trainig'; did you mean 'training'?"),
        (
            '[training]\nschedule = "ploy"\n',
            "'schedule': expected one of 'warmup_cosine', 'poly', 'constant', got 'ploy'",
        ),
    ],
    ids=["key", "section", "word"],
)
def test_l1_a_key_of_a_configuration_file_that_there_is_none_of(text, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(text)
    code, _, errors = run_main(["train", "plain_unet", "cohort", "--out", "x", "--config", "run.toml"], capsys)
    assert (code, Path("x").exists()) == (2, False)
    assert errors.startswith("trifuse: ")
    assert "run.toml" in errors
    assert message in errors


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["train", "fias", "cohort", "--out", "x", "--keep", "labelled"], "slices", "labelled"),
        (["train", "ecg", "--study", "cohort", "--out", "x"], "cohort", Path("cohort")),
        (["ablate", "taff_unet", "--study", "cohort", "--out", "x"], "cohort", Path("cohort")),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_options_by_their_older_names(argv, name, value):
    assert getattr(build_parser().parse_args(argv), name) == value


def test_a_word_wins_over_what_lies_with_converted_weights(tmp_path):
    config = {"variant": "tiny", "num_registers": 4}
    described = {"format": "trifuse", "schema_version": 1, "architecture": "dinov2", "config": config}
    (tmp_path / "config.json").write_text(json.dumps(described))
    words = ["train", "dino_unet", "cohort", "--out", "x", "--variant", "small", "--encoder", str(tmp_path)]
    arguments = build_parser().parse_args(words)
    values = given_values(arguments, arguments.options)
    assert (values["network.variant"], values["network.num_registers"]) == ("small", 4)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["train", "dino_unet", "cohort", "--out", "x", "--lr", "1", "--lr", "1"], "--lr"),
        (["train", "dino_unet", "cohort", "--out", "x", "--slices", "all", "--keep", "labelled"], "--slices/--keep"),
        (["train", "taff_unet", "cohort", "--out", "x", "--test-cases", "a", "--test-cases", "b"], "--test-cases"),
        (["evaluate", "p", "cohort", "--out", "x", "--out", "y"], "--out"),
        (["data", "check", "cohort", "--layout", "plain", "--layout", "acdc"], "--layout"),
        (["predict", "m", "i", "--out", "x", "--window", "0", "1", "--window", "0", "2"], "--window"),
    ],
)
def test_l17_an_option_that_is_given_twice_is_refused(words, option, capsys):
    code, _, errors = run_main(words, capsys)
    assert code == 2
    assert f"error: argument {option}: given more than once" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "run", "./run"], "expected two runs to compare, got run twice"),
        (
            ["plot", "bullseye", "x", "--reference", "orientation", "--out", "y", "--cavity", "1", "2"],
            "--cavity and --wall: expected classes of their own, got 2 in both",
        ),
    ],
)
def test_l17_one_thing_in_two_places_is_refused(words, message, capsys):
    code, _, errors = run_main(words, capsys)
    assert (code, message in errors) == (2, True), errors


def test_l17_targets_are_counted(tmp_path, capsys):
    """The one option that may be repeated, beside --set, loses none of its values."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.nii.gz").touch()
    for words in (["lv=1", "lv=2"], ["1", "2"], ["lv=1", "rv=1"], ["lv=1,1"], ["background=1", "lv=2"]):
        given = [word for target in words for word in ("--target", target)]
        code, _, errors = run_main(["data", "check", str(tmp_path), *given], capsys)
        assert code == 3, (words, errors)
