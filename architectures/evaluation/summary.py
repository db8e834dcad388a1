"""Summaries of many scores: mean and standard deviation of each class, as numbers and as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from trifuse.architectures.data.layouts.found import MEAN_OF_CLASSES
from trifuse.architectures.storage.text import count

from .metrics import Conventions
from .scoring import Row

SCAR = "scar"  # the class that speaks for a run where there is one
LEVEL = 0.95  # of intervals
OWN_PATIENTS = "each taken as a patient of its own"
PUBLISHED = ("dsc", "hd95")  # how the names of the scores begin that tables of several conventions show

METRIC_NAMES = {
    "dsc": "DSC",
    "iou": "IoU",
    "precision": "Precision",
    "sensitivity": "Sensitivity",
    "volume_difference_ml": "Volume difference, mL",
    "volume_difference_relative": "Volume difference, share",
    "volume_difference_vox": "Volume difference, voxels",
    "hd95_mm": "HD95, mm",
    "hd95_vox": "HD95, voxels",
}


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n - 1 in the denominator; NaN for one) of one score of one class.

    Computed from ``count`` scores; ``undefined`` more were NaN under the convention and left out. From ``low`` to
    ``high`` is the interval of the mean at ``level``, of so many ``patients``; NaN where nobody asked, or of one. What
    was ``drawn`` for it are ``"patients"``, or ``"cases"`` where each is taken as a patient of its own.
    """

    class_name: str
    metric: str
    mean: float
    sd: float
    count: int
    undefined: int
    low: float = math.nan
    high: float = math.nan
    level: float = LEVEL
    patients: int = 0
    drawn: str = ""


class Scored(NamedTuple):
    """Summaries, the conventions that they hold under, and how the names of those scores begin that papers report."""

    conventions: Conventions
    summaries: Sequence[Summary]
    metrics: tuple[str, ...] = PUBLISHED

    @property
    def published(self) -> list[Summary]:
        """The scores that papers report: DSC and HD95, unless others were named."""
        return [summary for summary in self.summaries if summary.metric.startswith(self.metrics)]


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Return mean and SD over the rows for each class and score, and the mean of the classes' means if there are many.

    NaN scores, undefined under the convention, are left out of the mean and counted. The SD beside the mean of the
    classes is that of the units' own means over their classes.
    """
    summaries = []
    for class_name in dict.fromkeys(row.class_name for row in rows):
        of_class = [row for row in rows if row.class_name == class_name]
        for metric in of_class[0].scores:
            summaries.append(_summary(class_name, metric, [row.scores[metric] for row in of_class]))
    if len({row.class_name for row in rows}) > 1:
        for metric in rows[0].scores:
            mean = mean_of_defined([s.mean for s in summaries if s.metric == metric])
            of_units = _summary(MEAN_OF_CLASSES, metric, list(_class_means(rows, metric)))
            summaries.append(replace(of_units, mean=mean))
    return summaries


def summarise_runs(runs: Sequence[Sequence[Row]]) -> list[Summary]:
    """Return mean and SD over runs of what `summarise` finds in each: the mean over its cases, and over its classes."""
    means: dict[tuple[str, str], list[float]] = {}
    for rows in runs:
        for summary in summarise(rows):
            means.setdefault((summary.class_name, summary.metric), []).append(summary.mean)
    return [_summary(class_name, metric, values) for (class_name, metric), values in means.items()]


def headline_class(class_names: Iterable[str]) -> str:
    """Return what speaks for a run: the scar where it is a class, else the mean of the classes, or the only one."""
    names = list(dict.fromkeys(class_names))
    if SCAR in names:
        return SCAR
    return names[0] if len(names) == 1 else MEAN_OF_CLASSES


def headline_summaries(summaries: Sequence[Summary]) -> list[Summary]:
    """Return the summaries that speak for a run, see `headline_class`."""
    name = headline_class(s.class_name for s in summaries if s.class_name != MEAN_OF_CLASSES)
    return [summary for summary in summaries if summary.class_name == name]


def headline_scores(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """Return by case the score that speaks for a run: that of the scar, or `case_means`."""
    of_scar = [row for row in rows if row.class_name == SCAR]
    return case_means(of_scar or rows, metric)


def headline_words(rows: Sequence[Row]) -> tuple[str, str]:
    """Return the DSC that speaks for a run, with its spread, and what it is of, in Markdown.

    Of a run with a scar, the mean of the classes follows.
    """
    conventions, summaries = rows[0].conventions, summarise(rows)
    (dsc,) = (summary for summary in headline_summaries(summaries) if summary.metric == "dsc")
    says = "from" if math.isnan(dsc.sd) else "mean ± SD over"
    of_what = f"for {dsc.class_name}, {says} {count(dsc.count, conventions.aggregation)}"
    return (
        f"DSC {_with_spread(dsc)}",
        f"{of_what}, empty masks `{conventions.empty_masks}`.{beside_the_scar(summaries)}",
    )


def plain(markdown: str) -> str:
    """Return a headline without its marks, for a terminal."""
    return re.sub(r"\\(.)", r"\1", re.sub(r"\*\*|`", "", markdown))


def beside_the_scar(summaries: Sequence[Summary]) -> str:
    """Return a sentence on the mean of the classes where the scar speaks for a run; empty where the mean does."""
    means = [s for s in summaries if (s.class_name, s.metric) == (MEAN_OF_CLASSES, "dsc")]
    if not means or headline_summaries(summaries)[0].class_name == MEAN_OF_CLASSES:
        return ""
    return f" The {MEAN_OF_CLASSES} is {_with_spread(means[0])}."


def _with_spread(summary: Summary) -> str:
    return format_score(summary.mean, summary.metric) if math.isnan(summary.sd) else mean_and_sd(summary)


def mean_of_defined(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if all are."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def case_means(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """Return the mean of a score over all rows of each case, by case in the order of the rows; NaN where undefined."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row.case_id, []).append(row.scores[metric])
    return {case_id: mean_of_defined(values) for case_id, values in scores.items()}


def summary_cells(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Return header and readable cells of a summary, one line per class, for a terminal or a report."""
    metrics = list(dict.fromkeys(s.metric for s in summaries))
    lines = []
    for class_name in dict.fromkeys(s.class_name for s in summaries):
        of_class = {s.metric: s for s in summaries if s.class_name == class_name}
        n = max(s.count + s.undefined for s in of_class.values())
        cells = map(mean_and_sd, of_class.values())
        lines.append([class_name, str(n), *cells])
        if title := interval_title(of_class.values()):
            lines.append([title, "", *map(interval_words, of_class.values())])
    return ["Mean ± SD", "n", *(METRIC_NAMES[metric] for metric in metrics)], lines


def side_by_side_cells(scored: Sequence[Scored]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of DSC and HD95 under several conventions, one line per class and one for their mean.

    The convention stands beside each of its columns.
    """
    columns: dict[str, dict[str, Summary]] = {}
    for under_one in scored:
        for summary in under_one.published:
            title = f"{METRIC_NAMES[summary.metric]} ({under_one.conventions.empty_masks})"
            columns.setdefault(title, {})[summary.class_name] = summary
    lines = []
    for name in dict.fromkeys(name for cells in columns.values() for name in cells):
        of_class = [cells[name] for cells in columns.values()]
        lines.append([name, *map(mean_and_sd, of_class)])
        if title := interval_title(of_class):
            lines.append([title, *map(interval_words, of_class)])
    return ["Mean ± SD", *columns], lines


def case_by_class_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of DSC and HD95 of every case, one line per case, one column per class."""
    conventions = rows[0].conventions
    hd95 = conventions.hd95
    names = list(dict.fromkeys(row.class_name for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        cells = lines.setdefault(f"{row.case_id} ({row.status})" if row.failed else row.case_id, {})
        cells[row.class_name] = " / ".join(format_score(row.scores[metric], metric) for metric in ("dsc", hd95))
    title = f"DSC / {METRIC_NAMES[hd95]} ({conventions.empty_masks})"
    return [title, *names], [[case, *(cells[name] for name in names)] for case, cells in lines.items()]


def undefined_scores(summaries: Sequence[Summary]) -> list[str]:
    """Return a sentence for each score of which some values were undefined and left out."""
    return [
        f"{METRIC_NAMES[s.metric]} of {s.class_name}: {s.undefined} of {s.count + s.undefined} undefined and left out "
        "of the mean."
        for s in summaries
        if s.undefined
    ]


def failures(rows: Sequence[Row]) -> list[str]:
    """Return the cases whose scores stand for a failed prediction, with the reason: ``case_3 (missing prediction)``."""
    return sorted({f"{row.case_id} ({row.status})" for row in rows if row.failed})


def format_summary(first: Scored, *others: Scored) -> str:
    """Return summaries as text: the conventions, aligned columns, what was left out; several side by side."""
    scored = (first, *others)
    cells = side_by_side_cells(scored) if others else summary_cells(first.summaries)
    notes = undefined_scores(first.summaries)
    if others:
        notes = [f"{one.conventions.empty_masks}: {note}" for one in scored for note in undefined_scores(one.published)]
    notes += interval_notes(first.summaries)
    return "\n".join([*(one.conventions.describe() for one in scored), "", *aligned(*cells), *notes])


def format_score(value: float, metric: str) -> str:
    """Return a score as text: three decimals, two if it has a unit, a dash if it is undefined."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if metric.endswith(("_ml", "_mm", "_vox")) else f"{value:.3f}"


def mean_and_sd(summary: Summary) -> str:
    """Return mean and spread as text: ``0.850 ± 0.071``."""
    return f"{format_score(summary.mean, summary.metric)} ± {format_score(summary.sd, summary.metric)}"


def interval_title(summaries: Iterable[Summary]) -> str:
    """Return what a line of intervals is called; empty where none of them is known."""
    known = [summary for summary in summaries if not math.isnan(summary.low)]
    return f"  {100 * known[0].level:g} % interval" if known else ""


def interval_words(summary: Summary) -> str:
    """Return an interval as text: ``0.812 to 0.890``, a dash if there is none."""
    if math.isnan(summary.low):
        return "-"
    return " to ".join(format_score(end, summary.metric) for end in (summary.low, summary.high))


def interval_notes(summaries: Iterable[Summary]) -> list[str]:
    """Return the sentence that says what the intervals of a table are, or why there are none; none if nobody asked."""
    summaries = list(summaries)
    patients = {summary.patients for summary in summaries if not math.isnan(summary.low)}
    if not patients:
        alone = any(summary.patients == 1 for summary in summaries)
        return ["No intervals of the means: one patient says nothing about others."] if alone else []
    drawn, of = summaries[0].drawn, " to ".join(map(str, sorted({min(patients), max(patients)})))
    how = "each with all its cases"
    if drawn == "cases":
        how = f"{OWN_PATIENTS}; give --patient REGEX if several are of one"
    return [f"Intervals of the means: percentile bootstrap over {of} {drawn}, {how}."]


def are_own_patients(patients: Iterable[tuple[str, str]]) -> bool:
    """Tell from cases and their patients whether each case is taken as a patient of its own, as where nobody says."""
    return all(case_id == patient for case_id, patient in patients)


def aligned(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of text in columns."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [header, *cells])
    return ["  ".join(line).rstrip() for line in padded]


def _class_means(rows: Sequence[Row], metric: str) -> Iterator[float]:
    units: dict[tuple[str, int | None], list[float]] = {}
    for row in rows:
        units.setdefault((row.case_id, row.slice), []).append(row.scores[metric])
    yield from map(mean_of_defined, units.values())


def _summary(class_name: str, metric: str, scores: Sequence[float]) -> Summary:
    defined = np.array([score for score in scores if not math.isnan(score)], dtype=float)
    mean = float(defined.mean()) if defined.size else math.nan
    sd = float(defined.std(ddof=1)) if defined.size > 1 else math.nan
    return Summary(class_name, metric, mean, sd, int(defined.size), len(scores) - int(defined.size))
