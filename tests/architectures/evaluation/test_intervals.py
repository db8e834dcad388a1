"""Intervals of means: of patients, by their definition, also where classes lack scores; and how they are shown."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from trifuse.architectures.evaluation.intervals import summarise_with_intervals
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.scoring import Row
from trifuse.architectures.evaluation.statistics import BOOTSTRAP_RESAMPLES, bootstrap_interval
from trifuse.architectures.evaluation.summary import LEVEL, MEAN_OF_CLASSES, Scored, format_summary, summarise
from trifuse.architectures.evaluation.tables import write_summary_table

STRICT = Conventions()


def scored(case_id, dsc, *, patient=None, class_name="atrium", index=None):
    return Row(case_id, patient or case_id, class_name, index, "ok", dict.fromkeys(STRICT.metrics, dsc), STRICT)


def test_means_have_the_intervals_of_their_patients():
    values = {"a": 0.5, "b": 0.9, "c": 0.7, "d": math.nan}
    rows = [scored(case_id, dsc) for case_id, dsc in values.items()]
    found = {each.metric: each for each in summarise_with_intervals(rows, 0.9)}
    low, high = bootstrap_interval([0.5, 0.9, 0.7], ["a", "b", "c"], level=0.9)
    dsc = found["dsc"]
    assert (dsc.low, dsc.high, dsc.level, dsc.patients, dsc.undefined) == (low, high, 0.9, 3, 1)
    assert replace(dsc, low=math.nan, high=math.nan, level=LEVEL, patients=0, drawn="") == summarise(rows)[0]


def test_cases_of_one_patient_stay_together_in_the_interval_of_a_mean():
    apart = [scored(f"c{i}", dsc) for i, dsc in enumerate([0.5] * 6 + [0.9] * 6)]
    together = [replace(row, patient=f"p{i // 6}") for i, row in enumerate(apart)]
    widths = [dsc.high - dsc.low for dsc in (summarise_with_intervals(rows)[0] for rows in (apart, together))]
    assert widths[0] < widths[1] == pytest.approx(0.4)


def test_the_interval_of_the_mean_of_classes_is_that_of_the_cases_own_means():
    rows = [scored(c, d, class_name=k) for c, of in {"a": (0.9, 0.1), "b": (0.5, 0.7), "c": (0.8, 0.4)}.items()
            for k, d in zip(("LV", "RV"), of, strict=True)]  # fmt: skip
    (mean,) = (
        each for each in summarise_with_intervals(rows) if (each.class_name, each.metric) == (MEAN_OF_CLASSES, "dsc")
    )
    assert (mean.low, mean.high) == pytest.approx(bootstrap_interval([0.5, 0.6, 0.6], ["a", "b", "c"]))


def test_t19_one_patient_has_no_interval():
    for rows in ([scored("a", 0.5)], [scored("a", 0.5, patient="p"), scored("b", 0.7, patient="p")]):
        dsc = summarise_with_intervals(rows)[0]
        assert math.isnan(dsc.low)
        assert dsc.patients == 1
        text = format_summary(Scored(STRICT, [dsc]))
        assert "% interval" not in text
        assert text.endswith("\nNo intervals of the means: one patient says nothing about others.")
    assert "intervals" not in format_summary(Scored(STRICT, summarise(rows)))  # of which nobody asked


def test_intervals_stand_below_their_means():
    rows = [scored(c, d, patient=c.upper()) for c, d in (("a", 0.5), ("b", 0.9))]
    once = Scored(STRICT, summarise_with_intervals(rows, 0.9))
    lines = format_summary(once).splitlines()
    assert lines[3].startswith("atrium")
    assert lines[4].split()[:7] == ["90", "%", "interval", "0.500", "to", "0.900", "0.500"]
    assert lines[-1] == "Intervals of the means: percentile bootstrap over 2 patients, each with all its cases."
    side_by_side = format_summary(once, once._replace(conventions=Conventions("nnunet"))).splitlines()
    assert [line.split()[:4] for line in side_by_side[4:6]] == [
        ["atrium", "0.700", "±", "0.283"],
        ["90", "%", "interval", "0.500"],
    ]


def test_cases_that_are_taken_as_patients_of_their_own_are_called_so(tmp_path):
    """Nobody said whose they are: of several of one patient the interval would be too narrow, and the note says so."""
    apart = [scored(f"P{i}_ED", dsc) for i, dsc in enumerate([0.5, 0.9, math.nan])]
    together = [replace(row, patient="P0") for row in apart[:2]] + [replace(apart[0], case_id="P1_ED", patient="P1")]
    notes, drawn = [], []
    for rows in (apart, apart[:2], together):
        once = Scored(STRICT, summarise_with_intervals(rows))
        notes.append(format_summary(once).splitlines()[-1])
        write_summary_table(tmp_path / "summary.csv", [once])
        drawn.append({line["drawn"] for line in csv.DictReader((tmp_path / "summary.csv").open())})
    cases = "2 cases, each taken as a patient of its own; give --patient REGEX if several are of one."
    patients = "2 patients, each with all its cases."
    assert notes == [f"Intervals of the means: percentile bootstrap over {of}" for of in (cases, cases, patients)]
    assert drawn == [{"cases"}, {"cases"}, {"patients"}]


def test_the_mean_of_classes_is_drawn_as_it_is_defined_where_scores_are_missing():
    """Of a class that half of the patients lack, the cases' own means would lie elsewhere than the mean of classes."""
    scores = {"a": (0.9, math.nan), "b": (0.8, math.nan), "c": (0.9, 0.2), "d": (0.7, 0.3), "e": (1.0, 0.1)}
    rows = [scored(c, d, class_name=k) for c, of in scores.items() for k, d in zip(("LV", "RV"), of, strict=True)]
    (mean,) = (
        each for each in summarise_with_intervals(rows) if (each.class_name, each.metric) == (MEAN_OF_CLASSES, "dsc")
    )
    values, drawn = np.array(list(scores.values())), np.random.default_rng(0).integers(5, size=(BOOTSTRAP_RESAMPLES, 5))
    means = [np.nanmean([np.nanmean(column) for column in values[of].T if not np.isnan(column).all()]) for of in drawn]
    assert (mean.low, mean.high) == pytest.approx(np.quantile(means, [0.025, 0.975]))
    assert mean.low < mean.mean < mean.high
    assert mean.patients == 5
