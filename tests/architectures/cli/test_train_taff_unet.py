"""``trifuse train taff_unet`` and ``trifuse train ecg``: the prior's choice, and the autoencoder that comes before."""

from __future__ import annotations

import json

import pytest
from command import run_main

from trifuse.architectures.cli.main import main
from trifuse.architectures.taff_unet import EcgAutoencoder
from trifuse.architectures.taff_unet.pretrain import EcgPretrainingRecipe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "prior.source: setting 'full' takes the AHA-17 prior"),
        (["--prior", "gt", "--strict"], "refused because of --strict"),
        (["--prior", "oracle"], "invalid choice: 'oracle'"),
        (["--setting", "ecgap", "--prior", "gt"], "invalid choice: 'ecgap'"),
        (["--prior", "gt", "--variant", "tiny"], "unrecognized arguments: --variant"),
        (["--prior", "gt", "--set", "prior.fold=3"], "did you mean 'folds'?"),
    ],
)
def test_l1_l2_e11_wrong_words_are_named(words, message, capsys, scar_cohort, tmp_path):
    code, _, errors = run_main(["train", "taff_unet", scar_cohort, "--out", tmp_path / "run", *words], capsys)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "run").exists()


def test_the_last_lines_of_a_training_are_the_headline_and_its_report(scar_cohort, tmp_path, capsys, monkeypatch):
    report = tmp_path / "report.md"
    report.write_text("# t\n\n**DSC 0.612 ± 0.100** for scar, mean ± SD over 2 volumes.\n\n## Scores\n")
    monkeypatch.setattr("trifuse.architectures.runs.pipeline.train", lambda recipe, out, **_: report)
    words = ["train", "taff_unet", scar_cohort, "--prior", "gt", "--out", tmp_path]
    code, output, _ = run_main(words, capsys)
    assert code == 0
    assert output.splitlines()[-2:] == ["DSC 0.612 ± 0.100 for scar, mean ± SD over 2 volumes.", f"report: {report}"]


@pytest.mark.slow
def test_an_autoencoder_is_trained_on_a_cohort_and_starts_the_network(scar_cohort, tmp_path, capsys, monkeypatch):
    words = ["train", "ecg", "--cohort", scar_cohort, "--out", tmp_path / "ecg", "--epochs", 2, "--batch-size", 4]
    assert run_main(words, capsys)[0] == 0
    run = json.loads((tmp_path / "ecg" / "run.json").read_text())
    assert run["recipe"]["lr"] == 1e-4  # fine-tuning is slower
    assert EcgAutoencoder.from_pretrained(tmp_path / "ecg" / "best").config == EcgPretrainingRecipe().network
    recipes = []
    monkeypatch.setattr("trifuse.architectures.runs.pipeline.train", lambda recipe, out, **_: recipes.append(recipe))
    words = ["train", "taff_unet", scar_cohort, "--ecg", tmp_path / "ecg" / "best", "--prior", "gt", "--out", tmp_path]
    assert run_main(words, capsys)[0] == 0
    assert recipes[0].network.ecg_checkpoint == str(tmp_path / "ecg" / "best")
    assert recipes[0].prior.source == "gt"


def test_further_folders_of_records_train_too(scar_cohort, tmp_path, monkeypatch):
    recipes = []
    monkeypatch.setattr(
        "trifuse.architectures.taff_unet.pretrain.train", lambda recipe, *_, **__: recipes.append(recipe)
    )
    folder = scar_cohort / "ecg"
    assert main(["train", "ecg", str(folder), "--also", str(folder), str(folder), "--out", str(tmp_path)]) == 0
    assert recipes[0].data.root == str(folder)
    assert recipes[0].data.also == (str(folder), str(folder))


def test_train_ecg_wants_one_source(scar_cohort, tmp_path, capsys):
    for sources in ([], [scar_cohort, "--cohort", scar_cohort]):
        assert run_main(["train", "ecg", *sources, "--out", tmp_path / "run"], capsys)[0] == 2
