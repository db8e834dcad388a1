"""Summaries: the mean of what is defined, the spread of a sample, and a count of what was left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.scoring import OK, Row
from trifuse.architectures.evaluation.summary import MEAN_OF_CLASSES, Scored, format_summary, summarise

STRICT = Conventions()


def row(case_id: str, dsc: float, *, class_name: str = "atrium", **scores: float) -> Row:
    values = {metric: scores.get(metric, dsc) for metric in STRICT.metrics}
    return Row(case_id, case_id, class_name, None, OK, values, STRICT)


def test_t19_the_spread_of_one_case_is_undefined():
    (dsc, *_) = summarise([row("a", 0.8)])
    assert (dsc.mean, dsc.count) == (0.8, 1)
    assert math.isnan(dsc.sd)


def test_summary_is_mean_and_sample_deviation_of_what_is_defined():
    rows = [row("a", 0.8), row("b", 0.9), row("c", 1.0, sensitivity=math.nan)]
    summaries = {s.metric: s for s in summarise(rows)}
    assert summaries["dsc"].mean == pytest.approx(0.9)
    assert summaries["dsc"].sd == pytest.approx(0.1)  # n - 1; the population's would be 0.0816
    assert (summaries["sensitivity"].count, summaries["sensitivity"].undefined) == (2, 1)
    assert summaries["sensitivity"].mean == pytest.approx(0.85)
    undefined = summarise([row("a", math.nan)])[0]
    assert math.isnan(undefined.mean)
    assert (undefined.count, undefined.undefined) == (0, 1)


def test_several_classes_also_get_the_mean_of_their_means():
    rows = [row("a", 0.8), row("a", 0.4, class_name="scar"), row("b", 0.9), row("b", math.nan, class_name="scar")]
    dsc = {s.class_name: s for s in summarise(rows) if s.metric == "dsc"}
    assert dsc["atrium"].mean == pytest.approx(0.85)
    assert dsc["scar"].mean == pytest.approx(0.4)
    assert dsc[MEAN_OF_CLASSES].mean == pytest.approx((0.85 + 0.4) / 2)  # over cases first, then over classes
    assert dsc[MEAN_OF_CLASSES].sd == pytest.approx(np.std([0.6, 0.9], ddof=1))


def test_summary_as_text_names_its_conventions_and_what_it_left_out():
    rows = [row("a", 0.8, sensitivity=math.nan), row("b", 0.9, hd95_mm=12.345)]
    lines = format_summary(Scored(STRICT, summarise(rows))).splitlines()
    assert lines[0] == STRICT.describe()
    assert lines[2].split()[:5] == ["Mean", "±", "SD", "n", "DSC"]
    assert lines[3].startswith("atrium     2  0.850 ± 0.071")
    assert "0.900 ± -" in lines[3]
    assert lines[-1] == "Sensitivity of atrium: 1 of 2 undefined and left out of the mean."
