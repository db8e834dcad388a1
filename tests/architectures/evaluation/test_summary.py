"""Summaries: the mean of what is defined, the spread of a sample, and a count of what was left out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.scoring import OK, Row
from trifuse.architectures.evaluation.summary import (
    MEAN_OF_CLASSES,
    Scored,
    case_by_class_cells,
    format_summary,
    headline_class,
    headline_scores,
    headline_summaries,
    headline_words,
    plain,
    side_by_side_cells,
    summarise,
    summarise_runs,
)

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


def test_slices_are_units_of_their_own_in_the_spread_of_the_classes_mean():
    """Two slices of one case: the spread is that of two means over the classes, not that of one case's."""
    scores = {("atrium", 0): 0.8, ("scar", 0): 0.4, ("atrium", 1): 1.0, ("scar", 1): 0.6}
    rows = [replace(row("a", dsc, class_name=name), slice=index) for (name, index), dsc in scores.items()]
    dsc = {s.class_name: s for s in summarise(rows) if s.metric == "dsc"}
    assert (dsc[MEAN_OF_CLASSES].mean, dsc[MEAN_OF_CLASSES].count) == (pytest.approx(0.7), 2)
    assert dsc[MEAN_OF_CLASSES].sd == pytest.approx(np.std([0.6, 0.8], ddof=1))


def test_summary_as_text_names_its_conventions_and_what_it_left_out():
    rows = [row("a", 0.8, sensitivity=math.nan), row("b", 0.9, hd95_mm=12.345)]
    lines = format_summary(Scored(STRICT, summarise(rows))).splitlines()
    assert lines[0] == STRICT.describe()
    assert lines[2].split()[:5] == ["Mean", "±", "SD", "n", "DSC"]
    assert lines[3].startswith("atrium     2  0.850 ± 0.071")
    assert "0.900 ± -" in lines[3]
    assert lines[-1] == "Sensitivity of atrium: 1 of 2 undefined and left out of the mean."


TRANSUNET = Conventions("transunet")


def transunet_row(case_id: str, dsc: float, hd95: float, class_name: str) -> Row:
    values = {metric: hd95 if metric == "hd95_vox" else dsc for metric in TRANSUNET.metrics}
    return Row(case_id, case_id, class_name, None, OK, values, TRANSUNET)


def both_conventions() -> list[list[Row]]:
    strict = [row(c, 0.1 * i, class_name=k, hd95_mm=10.0 * i) for i, (c, k) in enumerate(product("ab", ("LV", "RV")))]
    voxels = [transunet_row(c, 0.2 * i, 5.0 * i, k) for i, (c, k) in enumerate(product("ab", ("LV", "RV")))]
    return [strict, voxels]


def test_two_conventions_side_by_side_keep_their_columns_and_units():
    scored = [Scored(rows[0].conventions, summarise(rows)) for rows in both_conventions()]
    header, lines = side_by_side_cells(scored)
    assert header == [
        "Mean ± SD",
        "DSC (strict)",
        "HD95, mm (strict)",
        "DSC (transunet)",
        "HD95, voxels (transunet)",
    ]
    assert [line[0] for line in lines] == ["LV", "RV", MEAN_OF_CLASSES]
    assert lines[0][1:] == ["0.100 ± 0.141", "10.00 ± 14.14", "0.200 ± 0.283", "5.00 ± 7.07"]
    assert lines[1][1:] == ["0.200 ± 0.141", "20.00 ± 14.14", "0.400 ± 0.283", "10.00 ± 7.07"]
    text = format_summary(*scored)
    assert text.index(STRICT.describe()) < text.index(TRANSUNET.describe()) < text.index("DSC (strict)")


def test_undefined_scores_name_their_convention():
    strict, voxels = both_conventions()
    strict[0].scores["dsc"] = math.nan
    strict[0].scores["iou"] = math.nan  # is not shown, and not spoken of
    voxels[0].scores["hd95_vox"] = math.nan
    text = format_summary(*(Scored(rows[0].conventions, summarise(rows)) for rows in (strict, voxels)))
    assert "strict: DSC of LV: 1 of 2 undefined and left out of the mean." in text
    assert "transunet: HD95, voxels of LV: 1 of 2 undefined and left out of the mean." in text
    assert "IoU" not in text


def test_cases_by_class():
    header, lines = case_by_class_cells(both_conventions()[1])
    assert header == ["DSC / HD95, voxels (transunet)", "LV", "RV"]
    assert lines == [["a", "0.000 / 0.00", "0.200 / 5.00"], ["b", "0.400 / 10.00", "0.600 / 15.00"]]
    failed = [replace(one, status="missing prediction") for one in both_conventions()[0][:2]]
    assert case_by_class_cells(failed)[1][0][0] == "a (missing prediction)"


def test_the_mean_of_classes_is_that_of_their_means_over_cases():
    """With one score undefined the mean over cases of the mean over classes would be another number."""
    rows = [row("a", 0.9), row("a", math.nan, class_name="scar"), row("b", 0.7), row("b", 0.2, class_name="scar")]
    (dsc,) = (s for s in summarise(rows) if (s.class_name, s.metric) == (MEAN_OF_CLASSES, "dsc"))
    assert dsc.mean == pytest.approx(((0.9 + 0.7) / 2 + 0.2) / 2)
    assert dsc.mean != pytest.approx((0.9 + (0.7 + 0.2) / 2) / 2)


SCARRED = [row("a", 0.9), row("a", 0.3, class_name="scar"), row("b", 0.7), row("b", 0.1, class_name="scar")]
CHAMBERS = [row("a", 0.9), row("a", 0.3, class_name="wall"), row("b", 0.7), row("b", 0.1, class_name="wall")]


@pytest.mark.parametrize(
    ("rows", "name", "mean", "of_cases"),
    [
        (SCARRED, "scar", 0.2, {"a": 0.3, "b": 0.1}),
        (CHAMBERS, MEAN_OF_CLASSES, 0.5, {"a": 0.6, "b": 0.4}),
        (CHAMBERS[::2], "atrium", 0.8, {"a": 0.9, "b": 0.7}),
    ],
)
def test_the_scar_speaks_for_a_run_where_there_is_one(rows, name, mean, of_cases):
    assert headline_class(one.class_name for one in rows) == name
    (dsc,) = (s for s in headline_summaries(summarise(rows)) if s.metric == "dsc")
    assert (dsc.class_name, dsc.mean) == (name, pytest.approx(mean))
    assert headline_scores(rows, "dsc") == pytest.approx(of_cases)


def test_the_headline_in_words():
    assert headline_words(SCARRED) == (
        "DSC 0.200 ± 0.141",
        "for scar, mean ± SD over 2 volumes, empty masks `strict`. The mean of classes is 0.500 ± 0.141.",
    )
    assert headline_words(CHAMBERS) == (
        "DSC 0.500 ± 0.141",
        "for mean of classes, mean ± SD over 2 volumes, empty masks `strict`.",
    )
    assert headline_words(CHAMBERS[:1])[1] == "for atrium, from 1 volume, empty masks `strict`."
    assert plain(r"**DSC 0.1** of a\|b, `strict`") == "DSC 0.1 of a|b, strict"


def test_runs_are_summarised_by_their_own_means():
    runs = [[row("a", 0.8), row("b", 0.6)], [row("a", 0.9), row("b", 0.9)], [row("a", 0.5), row("b", 0.7)]]
    dsc = next(s for s in summarise_runs(runs) if s.metric == "dsc")
    assert (dsc.mean, dsc.count) == (pytest.approx((0.7 + 0.9 + 0.6) / 3), 3)
    assert dsc.sd == pytest.approx(np.std([0.7, 0.9, 0.6], ddof=1))
