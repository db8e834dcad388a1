"""Clinical read-outs: volumes, masses with their density, and the scar's share of the wall, by hand and on disk."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.readouts import Readout, readouts_of, share_percent, write_readouts
from trifuse.architectures.evaluation.scoring import evaluate_cases, score_case

NAMES = ("background", "blood pool", "myocardium", "scar")
SPACING_MM = (8.0, 1.25, 2.0)  # 20 mm3, 0.02 mL to the voxel


def wall(scar: int) -> np.ndarray:
    """Two slices of 16 pixels of blood pool in a wall of 24 pixels, so many of which are scar."""
    labels = np.zeros((2, 12, 12), np.uint8)
    labels[:, 4:8, 1:11] = 2
    labels[:, 5:7, 2:10] = 1
    labels[:, 4, 1 : 1 + scar] = 3
    return labels


def rows_of(truth, prediction, conventions=None, names=NAMES):
    return score_case(prediction, truth, SPACING_MM, names, conventions or Conventions(), case_id="a", patient="p")


def test_by_hand():
    """0.02 mL to the voxel: 32 voxels of blood, 48 of wall, of which 12 are scar, and 6 predicted."""
    found = {(each.quantity, each.class_name): each for each in readouts_of(rows_of(wall(6), wall(3)))}
    said = {key: (each.truth, each.prediction, each.unit) for key, each in found.items()}
    assert said == {
        ("volume", "blood pool"): (pytest.approx(0.64), pytest.approx(0.64), "ml"),
        ("volume", "myocardium"): (pytest.approx(0.72), pytest.approx(0.84), "ml"),
        ("volume", "scar"): (pytest.approx(0.24), pytest.approx(0.12), "ml"),
        ("mass", "myocardium"): (pytest.approx(0.756), pytest.approx(0.882), "g"),
        ("mass", "scar"): (pytest.approx(0.252), pytest.approx(0.126), "g"),
        ("burden", "scar"): (pytest.approx(25.0), pytest.approx(12.5), "%"),
    }
    assert found["mass", "scar"].method == "density 1.05 g/ml"
    assert found["burden", "scar"].method == "scar / (myocardium + scar)"
    assert {(each.case_id, each.patient, each.segment) for each in found.values()} == {("a", "p", None)}


def test_classes_of_another_heart_have_volumes_alone():
    labels = (wall(0) > 0).astype(np.uint8)
    (volume,) = readouts_of(rows_of(labels, labels, names=("background", "left atrium")))
    assert (volume.quantity, volume.class_name, volume.truth) == ("volume", "left atrium", pytest.approx(1.6))


def test_slices_and_volumes_in_voxels_give_nothing():
    assert readouts_of(rows_of(wall(6), wall(3), Conventions(aggregation="slice"))) == []
    assert readouts_of(rows_of(wall(6), wall(3), Conventions().in_voxels())) == []


def test_a_missing_prediction_has_a_truth_and_no_number(make_cohort, tmp_path):
    (volume,) = readouts_of(evaluate_cases(tmp_path, make_cohort("a"), ["a"]))
    assert volume.truth == pytest.approx(10 * 10 * 2 * 1.25 * 1.5 * 8 / 1000)
    assert math.isnan(volume.prediction)
    assert volume.method == "missing prediction"


def test_nothing_has_no_share():
    assert share_percent(1, 4) == 25
    assert math.isnan(share_percent(0, 0))
    empty = np.zeros_like(wall(0))
    burden = readouts_of(rows_of(empty, wall(3)))[-1]
    assert math.isnan(burden.truth)
    assert burden.prediction == pytest.approx(12.5)


def test_on_disk(tmp_path):
    readout = Readout("a", "p", "burden", "scar", 7, "%", 1 / 3, 0.5, "of the true wall")
    write_readouts(tmp_path / "r.csv", [readout, replace(readout, segment=None, prediction=math.nan)])
    with (tmp_path / "r.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert (first["segment"], float(first["truth"]), float(first["difference"])) == ("7", 1 / 3, 0.5 - 1 / 3)
    assert (second["segment"], second["prediction"], second["method"]) == ("", "nan", "of the true wall")
