"""The ablation: every row of the paper's table with either prior, finished trainings kept, one table with its p."""

from __future__ import annotations

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finished_run import mark_finished

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.phantoms.ambiguous import AmbiguousPhantom, read_truth, write_ambiguous_phantom
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.scoring import score_case
from trifuse.architectures.evaluation.summary import SCAR
from trifuse.architectures.evaluation.tables import write_case_table
from trifuse.architectures.runs.ablation import scores_of_runs
from trifuse.architectures.runs.pipeline import train
from trifuse.architectures.runs.recipes import RecipeError
from trifuse.architectures.taff_unet import EcgAutoencoder, EcgAutoencoderConfig, TaffUNet
from trifuse.architectures.taff_unet import ablate as ablation
from trifuse.architectures.taff_unet.ablate import CEILING
from trifuse.architectures.taff_unet.ambiguity_tables import write_ambiguity_tables
from trifuse.architectures.taff_unet.inputs import ORACLE
from trifuse.architectures.taff_unet.phantoms import ABLATIONS, Plan
from trifuse.kernels import DataError

DSC = {"baseline": 0.5, "ap": 0.8, "ecg": 0.5, "ecg_ap": 0.8, "full": 0.9}


@pytest.fixture
def trained(monkeypatch):
    """Let nothing be trained; return the recipes that would have been."""
    recipes = []

    def train(recipe, run, *, resume):
        assert resume
        TaffUNet(recipe.network)  # the row can be built
        recipes.append(recipe)
        run.mkdir(exist_ok=True)
        mark_finished(run, recipe)
        dsc = DSC[recipe.network.setting] + 0.01 * recipe.training.seed
        tested = open_cohort(Path(recipe.data.root))
        given = {case_id: dsc + 0.02 * (number % 3) for number, case_id in enumerate(tested.split.test)}
        write_scores(run / "test_cases.csv", tested, given)

    def autoencoder(recipe, out, *, resume):
        EcgAutoencoder(EcgAutoencoderConfig()).save_pretrained(out / "best")

    def pass_one(recipe, cohort, split, out, jobs):
        (out / "first_pass" / "labels").mkdir(parents=True, exist_ok=True)
        return out / "first_pass" / "labels"

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation.pretrain, "train", autoencoder)
    monkeypatch.setattr(ablation, "first_pass", pass_one)
    return recipes


def write_scores(path: Path, cohort, dsc) -> None:
    """Write a table of scores for test cases, whose scars have the given DSC, about."""
    rows = []
    for case_id, wanted in dsc.items():
        truth = np.zeros((1, 10, 100), np.uint8)
        truth[0, 0] = 1
        truth[0, 1] = 2
        truth[0, 2:4] = 3
        prediction = truth.copy()
        found = 200 - round(200 * wanted / (2 - wanted))  # DSC = 2 hits / (hits + 200)
        prediction[0, 2:4].flat[:found] = 0
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

    def write(plan, out, *, keep):
        asked.append((plan.phantom, plan.parts, keep))
        return scar_cohort

    monkeypatch.setattr(Plan, "write", write)
    table = ablation.ablate(tmp_path, seeds=1, epochs=1, cases=36)
    assert asked == [("easy", (20, 4, 12), True)]
    assert table.read_text().startswith("Synthetic: a phantom cohort of ")


# --------------------------------------------------------------------------------------------- the ambiguous phantom


@pytest.fixture(scope="module")
def ambiguous_cohort(tmp_path_factory):
    """Return a folder with the phantom of an ablation in it, whose cases are tiny, twenty of them to test."""
    out = tmp_path_factory.mktemp("ablation")
    write_ambiguous_phantom(
        out / "phantom", AmbiguousPhantom(2, 1, 20, size=(32, 32, 4), beats=0, missing=0.2, wrong=0.2)
    )
    return out


@pytest.fixture
def ablated(ambiguous_cohort, trained, monkeypatch):
    """Return the folder, its recipes, and a function that makes the table of 23 cases in it."""
    plan = replace(ABLATIONS["ambiguous"], parts=(2, 1, 20))
    monkeypatch.setitem(ABLATIONS, "ambiguous", plan)
    return lambda out, **options: ablation.ablate(out, phantom="ambiguous", **options)


def test_the_ambiguous_phantom_has_a_row_with_the_territory_given(ablated, trained, ambiguous_cohort, tmp_path):
    shutil.copytree(ambiguous_cohort / "phantom", tmp_path / "phantom")
    table = ablated(tmp_path, command=["trifuse", "ablate"])
    assert len(trained) == 8 * 5, "eight rows, five seeds"
    assert [recipe.network.setting for recipe in trained[::5]] == [
        *("baseline", "ap", "ap", "ecg_ap", "ecg_ap", "full", "full", "ap"),
    ]
    sources = [recipe.prior.source for recipe in trained[5::5]]
    assert sources == ["predicted", "gt", "predicted", "gt", "predicted", "gt", "gt"]
    truth = str(tmp_path / "phantom" / "truth.csv")
    assert [recipe.prior.arteries for recipe in trained[::5]] == [None] * 7 + [truth]
    assert {(recipe.network.image_size, recipe.network.fusion_stage) for recipe in trained} == {(64, 1)}
    text = table.read_text()
    assert text.startswith("Synthetic: an ambiguous phantom cohort of ")
    assert re.search(r"\| territory given \| oracle prior \| 0.8\d\d \|", text)
    for title in ("Gain in scar DSC", "by days between ECG and MRI", "by ambiguity"):
        assert title in text
    assert text.endswith("|\n\n`trifuse ablate`\n")
    for name in ("with_and_without_time", "with_and_without_ecg"):
        assert (tmp_path / f"{name}.png").exists()


def test_a_killed_ablation_goes_on_with_the_next_cell(ablated, trained, ambiguous_cohort, tmp_path, monkeypatch):
    shutil.copytree(ambiguous_cohort / "phantom", tmp_path / "phantom")
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "phantom/lge").iterdir()}
    train, done = ablation.train, []

    def killed(recipe, run, *, resume):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run)
        train(recipe, run, resume=resume)

    monkeypatch.setattr(ablation, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        ablated(tmp_path, seeds=1)
    monkeypatch.setattr(ablation, "train", train)
    ablated(tmp_path, seeds=1)
    assert len(trained) == 8, "none is trained twice"
    assert {path: path.stat().st_mtime_ns for path in images} == images, "the phantom is not written again"
    with pytest.raises(DataError, match="expected 40, as asked for, got 23"):
        ablated(tmp_path, seeds=1, cases=40)


def test_a_phantom_of_the_other_kind_is_not_taken_for_one_s_own(ambiguous_cohort, tmp_path):
    """As many cases as asked for, but others: a table of them would be called by the wrong name."""
    folder = tmp_path / "phantom"
    shutil.copytree(ambiguous_cohort / "phantom", folder)
    cases = len(open_cohort(folder).cases)
    asked = Plan(parts=(cases - 2, 1, 1))
    with pytest.raises(DataError, match="phantom: expected easy, as asked for, got ambiguous; choose another folder"):
        asked.write(tmp_path, keep=True)
    assert replace(asked, phantom="ambiguous").write(tmp_path, keep=True) == folder
    (folder / "truth.csv").unlink()
    with pytest.raises(DataError, match="phantom: expected ambiguous, as asked for, got easy"):
        replace(asked, phantom="ambiguous").write(tmp_path, keep=True)


def test_a_phantom_without_a_test_case_is_refused_before_anything_is_trained():
    for phantom, least in (("easy", 2), ("ambiguous", 3)):
        message = f"test cases: expected at least one, got none of {least - 1}; ask for {least} or more"
        with pytest.raises(DataError, match=message):
            ABLATIONS[phantom].of_cases(least - 1)
        assert ABLATIONS[phantom].of_cases(least).parts[2] == 1


def test_a_cohort_of_one_s_own_has_no_truth(tmp_path, scar_cohort):
    with pytest.raises(RecipeError, match="expected no phantom beside it, got 'ambiguous'"):
        ablation.ablate(tmp_path, phantom="ambiguous", cohort=scar_cohort)


def test_gains_and_results_by_ambiguity_and_days(ambiguous_cohort, tmp_path):
    """Scores that are known come out in the right cells."""
    cohort = open_cohort(ambiguous_cohort / "phantom")
    truth = read_truth(cohort.root)
    dsc = {
        "ap": lambda case: 0.5,
        "ecg_ap": lambda case: {"right": 0.8, "wrong": 0.2, "none": 0.5}[case["ecg"]],
        "full": lambda case: 0.9 if case["ecg"] == "right" and int(case["interval_days"]) < 21 else 0.5,
    }
    runs = {}
    for setting, score in dsc.items():
        runs[setting, "predicted"] = [tmp_path / f"{setting}-{seed}" for seed in range(2)]
        for seed, run in enumerate(runs[setting, "predicted"]):
            run.mkdir(exist_ok=True)
            given = {case: score(truth[case]) + 0.02 * seed * (setting != "ap") for case in cohort.split.test}
            write_scores(run / "test_cases.csv", cohort, given)
    text = write_ambiguity_tables(tmp_path, cohort.root, runs)
    gains = {(line["gained_by"], line["group"]): line for line in read(tmp_path / "gains.csv")}
    for (what, group), gain in {
        ("the ECG", "wrong ECG"): -0.29,
        ("the ECG", "no ECG"): 0.01,
        ("the ECG and time", "under 21 days"): 0.41,
        ("time", "60 days and more"): -0.3,
    }.items():
        line = gains[what, group]
        assert float(line["mean"]) == pytest.approx(gain, abs=0.004)
        low, high = sorted(float(line["mean"]) + side * 12.706 * 0.02 / 2 for side in (-1, 1))  # t of two seeds
        wanted = (line["mean"], line["mean"]) if what == "time" else (low, high)
        assert [float(line["low"]), float(line["high"])] == pytest.approx([*map(float, wanted)], abs=0.03)
    assert ("the territory", "all cases") not in gains, "that row is not there"
    counted = {group: int(line["cases"]) for (what, group), line in gains.items() if what == "the ECG"}
    assert counted.pop("all cases") == sum(counted.values()) == 20
    assert re.search(r"\| the ECG \| predicted \|.*\| -0.29\d \(-0.4\d\d to -0.1\d\d\) \|", text)

    days = {(line["setting"], line["days"]): line for line in read(tmp_path / "by_days.csv")}
    assert sum(int(line["cases"]) for (setting, _), line in days.items() if setting == "full") == 20
    assert float(days["ecg_ap", "no ECG"]["mean"]) == pytest.approx(0.51, abs=0.004)
    assert float(days["ecg_ap", "no ECG"]["sd"]) == pytest.approx(0.02 / 2**0.5, abs=0.004)

    cells = [line for line in read(tmp_path / "by_ambiguity.csv") if line["setting"] == "full"]
    assert sum(int(line["cases"]) for line in cells) == 20
    smaller = [case for case in cohort.split.test if float(truth[case]["decoy_share"]) < 0.45]
    assert sum(int(line["cases"]) for line in cells if line["ambiguity"] == "decoy smaller") == len(smaller) > 0
    assert {line["mean"] for line in cells if line["cases"] == "0"} <= {"nan"}


def read(path):
    return list(csv.DictReader(path.open()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_prior_alone_stays_far_below_the_territory_given(tmp_path):
    """The plain U-Net with the oracle prior, and the same network whose prior is that of the scarred territory."""
    plan = replace(ABLATIONS["ambiguous"], parts=(80, 6, 20), epochs=3)
    cohort = plan.write(tmp_path)
    scores = []
    for row in (("ap", ORACLE), CEILING):
        run = tmp_path / row[0]
        train(ablation._recipe(cohort, plan, row, tmp_path, tmp_path, 0), run)
        scores += scores_of_runs([run], ["dsc"], SCAR)["dsc"]
    assert scores[1] > 0.75
    assert scores[1] - scores[0] >= 0.15
