"""Dice by days and gate weights by days: real pictures, right bins, their numbers, and a sentence each."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from trifuse.architectures.evaluation.interval_figures import (
    INTERVAL_EDGES_DAYS,
    draw_gate_weights,
    draw_interval_bars,
    interval_bins,
)
from trifuse.architectures.evaluation.picture import BLUE, ORANGE
from trifuse.kernels import DataError

DAYS = {"a": 0.0, "b": 6.0, "c": 7.0, "d": 29.0, "e": 30.0, "f": 60.0, "g": 90.0}
WITH = {"a": 0.9, "b": 0.7, "c": 0.6, "d": 0.5, "e": 0.8, "f": 0.4, "g": 0.6}
WITHOUT = {case_id: score - 0.1 for case_id, score in WITH.items()}


def rows(picture):
    with open(picture.csv, newline="") as stream:
        return list(csv.DictReader(stream))


def colour_share(picture, colour):
    pixels = imread(picture.png)[..., :3]
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float((np.abs(pixels - wanted).max(-1) < 0.06).mean())


@given(days=st.lists(st.integers(0, 90), max_size=20))
def test_every_interval_lies_in_exactly_one_bin(days):
    bins = interval_bins({str(index): float(day) for index, day in enumerate(days)})
    assert [each.name for each in bins] == ["[0, 7)", "[7, 14)", "[14, 21)", "[21, 30)", "[30, 60)", "[60, 90]"]
    found = [case_id for each in bins for case_id in each.case_ids]
    assert sorted(found, key=int) == [str(index) for index in range(len(days))]
    for each in bins:
        for case_id in each.case_ids:
            day = days[int(case_id)]
            assert each.first_days <= day < each.last_days or (day == each.last_days == INTERVAL_EDGES_DAYS[-1])


def test_longer_intervals_have_a_bin_of_their_own(tmp_path):
    days = {"a": 90.0, "b": 91.0, "c": 5.0, "d": 400.0}
    *_, last, beyond = interval_bins(days)
    assert (last.name, last.case_ids) == ("[60, 90]", ("a",))
    assert (beyond.name, beyond.case_ids) == ("> 90", ("b", "d"))
    picture = draw_interval_bars(days, {"m": {"a": 0.1, "b": 0.4, "c": 0.7, "d": 0.6}}, tmp_path)
    assert (rows(picture)[-1]["days"], float(rows(picture)[-1]["mean"])) == ("> 90", pytest.approx(0.5))
    assert "> 90 0.500 m (n = 2)" in picture.alt


def test_bars(tmp_path):
    picture = draw_interval_bars(DAYS, {"with time": WITH, "without time": WITHOUT}, tmp_path)
    assert picture.png == tmp_path / "interval_bars.png"
    assert colour_share(picture, BLUE) > 0.02
    assert colour_share(picture, ORANGE) > 0.01
    table = {(row["days"], row["model"]): row for row in rows(picture)}
    assert len(table) == 12
    first = table["[0, 7)", "with time"]
    assert (first["cases"], float(first["mean"])) == ("2", pytest.approx(0.8))
    assert float(first["sd"]) == pytest.approx(np.std([0.9, 0.7], ddof=1))
    assert float(table["[60, 90]", "without time"]["mean"]) == pytest.approx(0.4)
    assert (table["[14, 21)", "with time"]["cases"], table["[14, 21)", "with time"]["mean"]) == ("0", "nan")
    assert "[0, 7) 0.800 with time, 0.700 without time (n = 2)" in picture.alt
    assert "[14, 21) no case" in picture.alt


def test_bars_are_as_high_as_their_means(tmp_path):
    """Nothing but full bars and empty ones: blue fills one bin of two up to its mean."""
    shares = []
    for score in (1.0, 0.5):
        picture = draw_interval_bars({"a": 5.0}, {"m": {"a": score}}, tmp_path, edges_days=(0, 10, 20))
        shares.append(colour_share(picture, BLUE))
    assert shares[1] / shares[0] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    ("days", "scores", "said"),
    [
        ({}, {"m": {}}, "none with an ECG"),
        ({"a": -1.0}, {"m": {"a": 0.5}}, "-1 for a"),
        ({"a": float("nan")}, {"m": {"a": 0.5}}, "nan for a"),
        ({"a": 1.0, "b": 2.0}, {"m": {"a": 0.5}}, "scores of m.*none of b"),
        ({"a": 1.0}, {"m": {"a": float("nan")}}, "none of a"),
    ],
)
def test_bars_that_cannot_be_drawn(tmp_path, days, scores, said):
    with pytest.raises(DataError, match=said):
        draw_interval_bars(days, scores, tmp_path)


def test_at_most_two_models(tmp_path):
    with pytest.raises(ValueError, match="one or two models, got 3"):
        draw_interval_bars(DAYS, dict.fromkeys("xyz", WITH), tmp_path)


def test_gate_weights(tmp_path):
    weights = {case_id: 0.7 - day / 200 for case_id, day in DAYS.items()}
    picture = draw_gate_weights(DAYS, weights, tmp_path)
    assert picture.png == tmp_path / "gate_weights.png"
    assert colour_share(picture, BLUE) > 0.0005
    assert [(row["case_id"], float(row["interval_days"]), float(row["ecg_weight"])) for row in rows(picture)] == [
        (case_id, DAYS[case_id], weights[case_id]) for case_id in DAYS
    ]
    assert "7 cases: from 0.250 to 0.700; its correlation with the days is -1.00." in picture.alt


@pytest.mark.parametrize("weights", [{"a": 0.5}, {"a": 0.5, "b": 0.5, "c": 0.5}])
def test_gate_weights_without_a_trend(tmp_path, weights):
    picture = draw_gate_weights({case_id: DAYS[case_id] for case_id in weights}, weights, tmp_path)
    assert picture.alt.endswith("from 0.500 to 0.500.")


@pytest.mark.parametrize(
    ("days", "weights", "said"),
    [
        ({}, {}, "none with an ECG"),
        ({"a": 1.0}, {}, "ECG weight of a.*got nothing"),
        ({"a": 1.0}, {"a": 1.5}, "got 1.5"),
        ({"a": 1.0}, {"a": float("nan")}, "got nan"),
    ],
)
def test_gate_weights_that_cannot_be_drawn(tmp_path, days, weights, said):
    with pytest.raises(DataError, match=said):
        draw_gate_weights(days, weights, tmp_path)
