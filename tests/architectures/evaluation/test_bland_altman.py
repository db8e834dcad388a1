"""Bias and limits of agreement against published numbers and their own coverage; and the picture of them."""

from __future__ import annotations

import csv
import math
import sys

import numpy as np
import pytest
from scipy import stats

from trifuse.architectures.evaluation import bland_altman
from trifuse.architectures.evaluation.bland_altman import draw_agreement, limits_of_agreement, volumes_by_class
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.picture import is_picture
from trifuse.architectures.evaluation.scoring import MISSING, OK, Row, Volumes
from trifuse.kernels import DataError, MissingExtra

# Bland and Altman (1986), "Statistical methods for assessing agreement between two methods of clinical measurement",
# Lancet 327, table 1: peak expiratory flow, l/min, the first reading of each meter
WRIGHT = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
MINI = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]


def row(case_id, truth_ml, prediction_ml, *, class_name="left atrium", patient=None, index=None):
    scores = dict.fromkeys(Conventions().metrics, 0.5)
    status = MISSING if math.isnan(prediction_ml) else OK
    volumes = Volumes(truth_ml, prediction_ml)
    return Row(case_id, patient or case_id, class_name, index, status, scores, Conventions(), volumes)


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are saved."""
    drawn = []
    save = bland_altman.save_picture

    def keep(figure, *args):
        drawn.append(figure)
        return save(figure, *args)

    monkeypatch.setattr(bland_altman, "save_picture", keep)
    return drawn


ATRIA = [row(f"case_{i}", 80.0 + 5 * i, 80.0 + 5 * i + shift) for i, shift in enumerate((4, -2, 3, 1, -1))]


def test_the_published_example():
    """Bias -2.1, SD 38.8, its interval -22.0 to 17.8; limits with 2 SD in place of 1.96 are -79.7 to 75.5."""
    found = limits_of_agreement(WRIGHT, MINI)
    assert (found.cases, found.patients) == (17, 17)
    assert found.bias == pytest.approx(-2.1, abs=0.05)
    assert found.sd == pytest.approx(38.8, abs=0.05)
    assert found.bias_interval == pytest.approx((-22.0, 17.8), abs=0.15)
    assert (found.lower, found.upper) == pytest.approx(
        (found.bias - 1.96 * found.sd, found.bias + 1.96 * found.sd), abs=0.01
    )
    for limit, interval in ((found.lower, found.lower_interval), (found.upper, found.upper_interval)):
        assert np.mean(interval) == pytest.approx(limit)
        assert (interval[1] - interval[0]) / 2 == pytest.approx(34.6, rel=0.01)  # theirs: -114.3 to -45.1


def test_intervals_cover_what_they_are_of():
    """Of 400 samples of 15 normal differences, about 95 % have the true bias, and the true limit, in their interval."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(400):
        found = limits_of_agreement(rng.normal(1, 2, 15), np.zeros(15))
        truth = (1.0, found.bias_interval), (1 + 1.959964 * 2, found.upper_interval)
        covered += [low <= value <= high for value, (low, high) in truth]
    assert (np.abs(covered / 400 - 0.95) < 0.035).all(), covered


def test_cases_of_one_patient_narrow_nothing():
    once = limits_of_agreement(WRIGHT, MINI)
    patients = [f"p{i}" for i in range(17)]
    twice = limits_of_agreement(WRIGHT * 2, MINI * 2, patients * 2)
    assert (twice.cases, twice.patients, twice.bias) == (34, 17, pytest.approx(once.bias))
    width, before = (each.bias_interval[1] - each.bias_interval[0] for each in (twice, once))
    assert width == pytest.approx(before * twice.sd / once.sd)


def test_another_level_has_another_interval_and_the_same_limits():
    wide, narrow = limits_of_agreement(WRIGHT, MINI), limits_of_agreement(WRIGHT, MINI, level=0.5)
    assert (wide.lower, wide.upper) == (narrow.lower, narrow.upper)
    reach = stats.t.ppf(0.75, 16) * narrow.sd / math.sqrt(17)
    assert narrow.bias_interval == pytest.approx((narrow.bias - reach, narrow.bias + reach))


@pytest.mark.parametrize(
    ("measured", "reference", "patients", "error", "said"),
    [
        ([1.0], [2.0], None, DataError, "patients: expected at least 2.*got 1"),
        ([1.0, 2.0], [2.0, 3.0], ["a", "a"], DataError, "patients: expected at least 2.*got 1"),
        ([1.0, math.nan], [2.0, 3.0], None, ValueError, "finite"),
        ([1.0, 2.0], [2.0], None, ValueError, "one length"),
    ],
)
def test_rejects(measured, reference, patients, error, said):
    with pytest.raises(error, match=said):
        limits_of_agreement(measured, reference, patients)


def test_l6_without_scipy_the_message_gives_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trifuse\[med\]'"):
        limits_of_agreement(WRIGHT, MINI)


def test_picture_points_and_limits(tmp_path, figures):
    rows = [*ATRIA, row("lost", 90.0, math.nan), *(row(f"case_{i}", 10.0, 10.0 + i, class_name="scar") for i in (0, 1))]
    picture = draw_agreement(rows, tmp_path)
    assert is_picture(picture.png)
    with (tmp_path / "volume_agreement.csv").open() as stream:
        points = list(csv.DictReader(stream))
    assert [point["case_id"] for point in points] == [f"case_{i}" for i in (0, 1, 2, 3, 4, 0, 1)]
    assert float(points[0]["mean_ml"]) == pytest.approx(82)
    assert [float(point["difference_ml"]) for point in points[:5]] == pytest.approx([4, -2, 3, 1, -1])
    with (tmp_path / "volume_agreement_limits.csv").open() as stream:
        atrium, scar = csv.DictReader(stream)
    assert (atrium["cases"], atrium["left_out"], scar["cases"], scar["left_out"]) == ("5", "1", "2", "0")
    expected = limits_of_agreement([4, -2, 3, 1, -1], np.zeros(5))
    for name, value in (("bias_ml", 1.0), ("lower_ml", expected.lower), ("upper_high_ml", expected.upper_interval[1])):
        assert float(atrium[name]) == pytest.approx(value)
    assert "left atrium: bias +1 mL" in picture.alt
    assert "5 cases, 1 case without a prediction left out" in picture.alt
    drawn = figures[0].axes[0]
    assert drawn.get_title(loc="left") == "left atrium"
    assert np.asarray(drawn.collections[-1].get_offsets())[:, 1] == pytest.approx([4, -2, 3, 1, -1])
    levels = [line.get_ydata()[0] for line in drawn.lines]
    assert levels == pytest.approx([0, expected.upper, 1.0, expected.lower])


def test_t19_of_one_patient_nothing_is_drawn(tmp_path):
    rows = [row("a", 80.0, 82.0, patient="p"), row("b", 90.0, 95.0, patient="p")]
    assert draw_agreement(rows, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_volumes_of_slices_and_unknown_volumes_do_not_count():
    rows = [row("a", 1.0, 2.0, index=0), row("b", 3.0, 4.0), Row("c", "c", "left atrium", None, OK, {}, Conventions())]
    (found,) = volumes_by_class(rows)
    assert (found.case_ids, found.left_out) == (("b",), 0)
