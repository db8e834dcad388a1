"""Summaries with the bootstrap interval of each mean: patients are drawn, each with all its cases and slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.data.layouts.found import MEAN_OF_CLASSES

from .scoring import Row
from .statistics import BOOTSTRAP_RESAMPLES, bootstrap_intervals, times_drawn
from .summary import LEVEL, Summary, are_own_patients, summarise


def summarise_with_intervals(rows: Sequence[Row], level: float = LEVEL) -> list[Summary]:
    """Return what `summarise` does, with the bootstrap interval of each mean, by patient.

    For the mean of the classes patients are drawn for all classes together, and each class's mean is taken over those
    of them that have one. Of one patient there is no interval (NaN): it says nothing about others.

    Args:
        rows: the scores.
        level: of the intervals.
    """
    drawn = "cases" if are_own_patients((row.case_id, row.patient) for row in rows) else "patients"
    summaries = [replace(summary, drawn=drawn) for summary in summarise(rows)]
    of_classes = [summary for summary in summaries if summary.class_name != MEAN_OF_CLASSES]
    scores = [_defined(rows, summary.class_name, summary.metric) for summary in of_classes]
    found = [
        replace(summary, low=low, high=high, level=level, patients=len(np.unique(patients)))
        for summary, (low, high), (_, patients, _) in zip(
            of_classes, bootstrap_intervals(scores, level), scores, strict=True
        )
    ]
    return found + [_of_mean(summary, rows, level) for summary in summaries if summary.class_name == MEAN_OF_CLASSES]


def _defined(rows: Sequence[Row], class_name: str, metric: str) -> tuple[NDArray, NDArray, NDArray]:
    """Return the defined scores of a class, as `bootstrap_intervals` takes them."""
    scores = [(row.scores[metric], row.patient) for row in rows if row.class_name == class_name]
    defined = [(score, patient) for score, patient in scores if not np.isnan(score)]
    values = np.array([score for score, _ in defined], float)
    return values, np.array([patient for _, patient in defined], str), np.ones_like(values)


def _of_mean(summary: Summary, rows: Sequence[Row], level: float) -> Summary:
    """Return the mean of the classes' means with its interval."""
    names = list(dict.fromkeys(row.class_name for row in rows))
    scores = [_defined(rows, name, summary.metric) for name in names]
    patients = np.unique(np.concatenate([of for _, of, _ in scores]))
    if len(patients) < 2:
        return replace(summary, level=level, patients=len(patients))
    places = [np.searchsorted(patients, of) for _, of, _ in scores]
    shape = len(patients)
    sums = np.stack([np.bincount(at, d, shape) for at, (d, _, _) in zip(places, scores, strict=True)], axis=1)
    counts = np.stack([np.bincount(at, minlength=shape) for at in places], axis=1)
    means = np.concatenate(
        [_mean_of_classes(times, sums, counts) for times in times_drawn(shape, BOOTSTRAP_RESAMPLES, 0)]
    )
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return replace(summary, low=float(low), high=float(high), level=level, patients=len(patients))


def _mean_of_classes(times: NDArray, sums: NDArray, counts: NDArray) -> NDArray:
    """Return the mean over classes of each draw (n,), over those of which a patient with a score was drawn.

    Args:
        times: how often each patient was drawn, (n, patients).
        sums: of each patient's scores, (patients, classes),
        counts: and their number.
    """
    drawn = times @ counts
    means = np.divide(times @ sums, drawn, out=np.zeros_like(drawn), where=drawn > 0)
    return means.sum(axis=1) / (drawn > 0).sum(axis=1)
