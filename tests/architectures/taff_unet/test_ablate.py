"""The ablation: every row of the paper's table with either prior, finished trainings kept, one table with its p."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.scoring import score_case
from trifuse.architectures.evaluation.tables import write_case_table
from trifuse.architectures.taff_unet import EcgAutoencoder, EcgAutoencoderConfig, TaffUNet
from trifuse.architectures.taff_unet import ablate as ablation

DSC = {"baseline": 0.5, "ap": 0.8, "ecg": 0.5, "ecg_ap": 0.8, "full": 0.9}


@pytest.fixture
def trained(scar_cohort, monkeypatch):
    """Let nothing be trained; return the recipes that would have been."""
    recipes = []
    cohort = open_cohort(scar_cohort)

    def train(recipe, run, *, resume):
        assert resume
        TaffUNet(recipe.network)  # the row can be built
        recipes.append(recipe)
        run.mkdir()
        (run / "report.md").touch()
        write_scores(run / "test_cases.csv", cohort, DSC[recipe.network.setting] + 0.01 * recipe.training.seed)

    def autoencoder(recipe, out, *, resume):
        EcgAutoencoder(EcgAutoencoderConfig()).save_pretrained(out / "best")
        (out / "report.md").touch()

    def pass_one(recipe, cohort, split, out, jobs):
        (out / "first_pass" / "labels").mkdir(parents=True, exist_ok=True)
        return out / "first_pass" / "labels"

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation.pretrain, "train", autoencoder)
    monkeypatch.setattr(ablation, "first_pass", pass_one)
    return recipes


def write_scores(path: Path, cohort, dsc: float) -> None:
    """Write a table of scores for the cohort's test cases, whose scars have about that DSC."""
    rows = []
    for number, case_id in enumerate(cohort.split.test):
        truth = np.zeros((1, 10, 100), np.uint8)
        truth[0, 0] = 1
        truth[0, 1] = 2
        truth[0, 2:4] = 3
        prediction = truth.copy()
        found = round(100 * dsc) + 2 * number
        prediction[0, 3, found - 100 if found > 100 else 0 :] = 0
        prediction[0, 2, min(found, 100) :] = 0
        names = cohort.class_names
        rows += score_case(prediction, truth, (8.0, 1.0, 1.0), names, Conventions(), case_id=case_id, patient=case_id)
    write_case_table(path, rows)


def test_every_row_is_trained_once_and_tabulated(scar_cohort, tmp_path, trained):
    command = ["trifuse", "ablate", "taff_unet"]
    table = ablation.ablate(tmp_path, seeds=2, epochs=3, cohort=scar_cohort, command=command)
    assert len(trained) == 2 * len(ablation.ROWS)
    assert [recipe.training.seed for recipe in trained[:4]] == [0, 1, 0, 1]
    assert {recipe.training.epochs for recipe in trained} == {3}
    built = [(r.network.setting, r.prior.source if r.network.takes_prior else "-") for r in trained[::2]]
    assert built == [
        ("baseline", "-"),
        ("ap", "predicted"),
        ("ap", "gt"),
        ("ecg", "-"),
        ("ecg_ap", "predicted"),
        ("ecg_ap", "gt"),
        ("full", "predicted"),
        ("full", "gt"),
    ]
    for recipe in trained:
        labels = str(tmp_path / "first_pass" / "labels") if recipe.prior.source == "predicted" else None
        assert recipe.prior.labels == labels
        assert (recipe.network.ecg_checkpoint is not None) == recipe.network.takes_ecg

    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(line["setting"], line["prior"]) for line in lines] == [*ablation.ROWS]
    assert lines[0]["p of DSC"] == "-"
    assert all(line["p of DSC"] not in ("", "-") for line in lines[1:])
    assert float(lines[-1]["scar DSC"]) > float(lines[0]["scar DSC"])
    text = table.read_text()
    assert text.startswith("Cohort phantom, with ")
    assert "oracle prior" in text
    assert text.endswith("\n`trifuse ablate taff_unet`\n")
    assert (tmp_path / "with_and_without_time.png").exists()

    ablation.ablate(tmp_path, seeds=2, epochs=3, cohort=scar_cohort)
    assert len(trained) == 2 * len(ablation.ROWS)


def test_the_phantom_is_called_synthetic_and_a_third_of_it_tests(tmp_path, trained, monkeypatch, scar_cohort):
    asked = []

    def write(out, *, parts):
        asked.append(parts)
        return scar_cohort

    monkeypatch.setattr(ablation, "write_demo_cohort", write)
    table = ablation.ablate(tmp_path, seeds=1, epochs=1, cases=72)
    assert asked == [(40, 8, 24)]
    assert table.read_text().startswith("Synthetic: a phantom cohort of ")
