"""What a cohort of myocardial scar reports of each case: Dice, precision, sensitivity, volume difference."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.report import Evaluation, write_report
from trifuse.architectures.evaluation.scoring import score_case
from trifuse.architectures.evaluation.statistics import paired_t_test

NAMES = ("background", "blood pool", "myocardium", "scar")
SPACING_MM = (8.0, 1.25, 2.0)  # 20 mm3, 0.02 mL to the voxel
SCAR = 3


def wall(scar: slice) -> np.ndarray:
    """Two slices of a blood pool in a wall of 30 pixels, some of which are scar."""
    labels = np.zeros((2, 12, 12), np.uint8)
    labels[:, 4:8, 1:11] = 2
    labels[:, 5:7, 2:10] = 1
    labels[:, 4, scar] = SCAR
    return labels


def scar_row(truth: slice, prediction: slice, conventions: Conventions):
    rows = score_case(wall(prediction), wall(truth), SPACING_MM, NAMES, conventions, case_id="a", patient="a")
    return next(row for row in rows if row.class_name == "scar")


@pytest.mark.parametrize(
    ("volume", "metric", "expected"),
    [
        ("absolute", "volume_difference_ml", 0.08),
        ("signed", "volume_difference_ml", -0.08),
        ("relative", "volume_difference_relative", 0.5),
        ("signed_relative", "volume_difference_relative", -0.5),
    ],
)
def test_scores_of_the_scar_by_hand(volume, metric, expected):
    """Of 4 true pixels in each of 2 slices, 1 is found, and 1 more beside them."""
    row = scar_row(slice(2, 6), slice(5, 7), Conventions(volume=volume))
    assert row.scores["dsc"] == pytest.approx(2 * 2 / (8 + 4))
    assert row.scores["precision"] == pytest.approx(0.5)
    assert row.scores["sensitivity"] == pytest.approx(0.25)
    assert row.scores[metric] == pytest.approx(expected)


def test_a_case_without_scar():
    none, some = slice(0, 0), slice(2, 4)
    found = scar_row(none, some, Conventions(volume="relative")).scores
    assert (found["dsc"], found["precision"]) == (0, 0)
    assert math.isnan(found["sensitivity"])
    assert math.isnan(found["volume_difference_relative"])
    right = scar_row(none, none, Conventions(volume="signed")).scores
    assert [right[name] for name in ("dsc", "precision", "sensitivity", "volume_difference_ml")] == [1, 1, 1, 0]


@pytest.mark.parametrize("volume", ["absolute", "signed", "relative", "signed_relative"])
def test_the_report_shows_them_for_each_class_and_case(tmp_path, volume):
    conventions = Conventions(volume=volume)
    rows = []
    for case, scar in (("a", slice(5, 7)), ("b", slice(2, 6))):
        rows += score_case(wall(scar), wall(slice(2, 6)), SPACING_MM, NAMES, conventions, case_id=case, patient=case)
    report = write_report(tmp_path, title="Scar", evaluations=[Evaluation("test", "Test cases", rows)]).read_text()
    share = "relative" in volume
    lines = report.splitlines()
    header = next(line for line in lines if line.startswith("| Mean ± SD"))
    for word in ("DSC", "Precision", "Sensitivity", f"Volume difference, {'share' if share else 'mL'}"):
        assert word in header
    line = next(line for line in lines[lines.index(header) :] if line.startswith("| scar"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    mean = {"absolute": "0.04", "signed": "-0.04", "relative": "0.250", "signed_relative": "-0.250"}[volume]
    assert any(cell.startswith(f"{mean} ±") for cell in cells)
    assert f"Volume difference: {volume.replace('_', ' ')}" in report
    table = list(csv.DictReader((tmp_path / "test_cases.csv").open()))
    assert [line["case_id"] for line in table if line["class_name"] == "scar"] == ["a", "b"]
    assert {"precision", "sensitivity", f"volume_difference_{'relative' if share else 'ml'}"} <= set(table[0])


def test_two_models_by_the_paired_t_test():
    """By hand: differences 0.1, 0.3, 0.2, mean 0.2, SD 0.1, so t is 2 * sqrt(3) at two degrees of freedom."""
    result = paired_t_test([0.5, 0.4, 0.6], [0.6, 0.7, 0.8])
    assert result.statistic == pytest.approx(2 * math.sqrt(3))
    assert result.p == pytest.approx(0.07418, abs=1e-5)
