"""Figures over the days between ECG and MRI: Dice per bin of days with and without time, and the gate's weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.storage.text import listed
from trifuse.kernels import DataError

from .picture import BLUE, FAINT, INK, LARGE, NORMAL, ORANGE, SMALL, Picture, new_figure, plain_axes, save_picture
from .tables import number

INTERVAL_EDGES_DAYS = (0.0, 7.0, 14.0, 21.0, 30.0, 60.0, 90.0)
"""Edges of the bins; each holds its first day and not its last, but for the last bin, which holds both. Where there are
longer intervals, a further bin holds these."""

_COLOURS, _HATCHES = (BLUE, ORANGE), ("", "//")


@dataclass(frozen=True)
class IntervalBin:
    """Cases whose interval lies in one bin.

    Attributes:
        first_days, last_days: its edges; the last one is infinite for intervals beyond all edges.
        closed: whether the last edge belongs to it.
        case_ids: its cases.
    """

    first_days: float
    last_days: float
    closed: bool
    case_ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """The bin in days, such as ``[7, 14)``, or ``> 90``."""
        if math.isinf(self.last_days):
            return f"> {self.first_days:g}"
        return f"[{self.first_days:g}, {self.last_days:g}{']' if self.closed else ')'}"


def interval_days(cohort: Cohort, case_ids: Iterable[str]) -> dict[str, float]:
    """Return the days between ECG and image of the cases that have an ECG."""
    known = {case_id: cohort.case(case_id).clinical for case_id in case_ids}
    return {
        case_id: clinical.interval_days
        for case_id, clinical in known.items()
        if clinical is not None and clinical.interval_days is not None
    }


def interval_bins(
    interval_days: Mapping[str, float], edges_days: Sequence[float] = INTERVAL_EDGES_DAYS
) -> list[IntervalBin]:
    """Sort cases into bins of days.

    Args:
        interval_days: days between ECG and MRI by case.
        edges_days: rising edges of the bins.

    Raises:
        DataError: an interval lies before the first edge, or is NaN; the message names the cases.
    """
    edges = np.asarray(edges_days, np.float64)
    strangers = {case_id: days for case_id, days in interval_days.items() if not days >= edges[0]}
    if strangers:
        got = listed(f"{days:g} for {case_id}" for case_id, days in strangers.items())
        raise DataError("interval figure", "days", got=got, want=f"{edges[0]:g} or more")
    last = len(edges) - 2
    beyond = tuple(case_id for case_id, days in interval_days.items() if days > edges[-1])
    within = {case_id: days for case_id, days in interval_days.items() if case_id not in beyond}
    chosen = {case_id: min(int((edges <= days).sum()) - 1, last) for case_id, days in within.items()}
    bins = [
        IntervalBin(first, end, index == last, tuple(case_id for case_id, at in chosen.items() if at == index))
        for index, (first, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    ]
    return [*bins, *([IntervalBin(float(edges[-1]), math.inf, False, beyond)] if beyond else [])]


def draw_interval_bars(
    interval_days: Mapping[str, float],
    scores: Mapping[str, Mapping[str, float]],
    out: Path,
    *,
    edges_days: Sequence[float] = INTERVAL_EDGES_DAYS,
    score_name: str = "scar DSC",
    name: str = "interval_bars",
) -> Picture:
    """Draw the mean score per bin of days of one or two models side by side, with a dot for every case.

    Args:
        interval_days: days between ECG and MRI by case; cases without an ECG are left out by the caller.
        scores: by model, such as ``"with time"`` and ``"without time"``, the score of every one of these cases.
        out: folder to write into.
        edges_days: edges of the bins.
        score_name: what the scores are.
        name: of the files, without suffix.

    Raises:
        DataError: there is no case, an interval that `interval_bins` refuses, or a model lacks a case's score.
        ValueError: more than two models.
    """
    if not 1 <= len(scores) <= len(_COLOURS):
        raise ValueError(f"expected one or two models, got {len(scores)}")
    if not interval_days:
        raise DataError("interval figure", "cases", got="none with an ECG", want="at least one")
    for model, of_case in scores.items():
        if absent := [case_id for case_id in interval_days if not np.isfinite(of_case.get(case_id, np.nan))]:
            raise DataError("interval figure", f"scores of {model}", got=f"none of {listed(absent)}", want="all")
    bins = interval_bins(interval_days, edges_days)
    figure = new_figure(1.3 * len(bins) + 1.4, 3.8)
    axis = figure.subplots()
    lines = []
    for index, (model, of_case) in enumerate(scores.items()):
        offset = (index - (len(scores) - 1) / 2) * 0.4
        values = [np.array([of_case[case_id] for case_id in each.case_ids]) for each in bins]
        _draw_model(axis, offset, values, index, model)
        lines += [
            [each.name, model, len(found), *(number(value) for value in _mean_and_sd(found))]
            for each, found in zip(bins, values, strict=True)
        ]
    _dress_bins(axis, bins, score_name)
    header = ["days", "model", "cases", "mean", "sd"]
    return save_picture(figure, out, name, _bars_title(score_name), _bars_alt(bins, lines, score_name), header, lines)


def draw_gate_weights(
    interval_days: Mapping[str, float], ecg_weights: Mapping[str, float], out: Path, *, name: str = "gate_weights"
) -> Picture:
    """Draw the gate's weight of the ECG against the days between ECG and MRI, a dot for every case.

    Args:
        interval_days: days by case.
        ecg_weights: mean weight of the ECG over the slices of each of these cases, 0 to 1.
        out: folder to write into.
        name: of the files, without suffix.

    Raises:
        DataError: there is no case, or one has no weight in [0, 1].
    """
    if not interval_days:
        raise DataError("gate figure", "cases", got="none with an ECG", want="at least one")
    for case_id in interval_days:
        if not 0 <= ecg_weights.get(case_id, np.nan) <= 1:
            got = ecg_weights.get(case_id, "nothing")
            raise DataError("gate figure", f"ECG weight of {case_id}", got=got, want="a number in [0, 1]")
    days = np.array(list(interval_days.values()), np.float64)
    weights = np.array([ecg_weights[case_id] for case_id in interval_days])
    figure = new_figure(5.6, 3.8)
    axis = figure.subplots()
    axis.axhline(0.5, color=FAINT, lw=1, ls="--", zorder=1)
    axis.scatter(days, weights, s=34, color=BLUE, edgecolor="white", linewidth=0.6, zorder=3)
    _dress(axis, "How far the ECG is believed", "Days between ECG and MRI")
    axis.set_ylabel("Gate weight of the ECG", fontsize=NORMAL, color=INK)
    axis.text(1.0, 0.505, "as much as the image", transform=axis.get_yaxis_transform(), ha="right", va="bottom",
              fontsize=SMALL, color=FAINT)  # fmt: skip
    lines = [[case_id, number(interval_days[case_id]), number(ecg_weights[case_id])] for case_id in interval_days]
    alt = (
        f"Gate weight of the ECG against days between ECG and MRI, {len(days)} cases: from {weights.min():.3f} to "
        f"{weights.max():.3f}{_trend(days, weights)}."
    )
    header = ["case_id", "interval_days", "ecg_weight"]
    return save_picture(figure, out, name, "Gate weight of the ECG against days", alt, header, lines)


def _draw_model(axis: Any, offset: float, values: Sequence[np.ndarray], index: int, model: str) -> None:
    """Draw a model's bars, and its cases as dots on them."""
    filled = [at for at, found in enumerate(values) if len(found)]
    means = [values[at].mean() for at in filled]
    places = [at + offset for at in filled]
    axis.bar(places, means, width=0.38, color=_COLOURS[index], hatch=_HATCHES[index], edgecolor="white", label=model)
    for place, at in zip(places, filled, strict=True):
        spread = np.linspace(-0.1, 0.1, len(values[at])) if len(values[at]) > 1 else np.zeros(1)
        axis.scatter(place + spread, values[at], s=9, color=INK, linewidth=0, zorder=3)


def _dress_bins(axis: Any, bins: Sequence[IntervalBin], score_name: str) -> None:
    _dress(axis, _bars_title(score_name), "Days between ECG and MRI, and number of cases")
    axis.set_xticks(range(len(bins)), [f"{each.name}\nn = {len(each.case_ids)}" for each in bins])
    axis.set_xlim(-0.6, len(bins) - 0.4)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel(score_name, fontsize=NORMAL, color=INK)
    axis.grid(False, axis="x")
    for at, each in enumerate(bins):
        if not each.case_ids:
            axis.text(at, 0.02, "no case", ha="center", va="bottom", fontsize=SMALL, color=FAINT, rotation=90)
    figure = axis.get_figure()
    figure.legend(loc="outside upper right", ncols=2, fontsize=SMALL, frameon=False, labelcolor=INK)


def _dress(axis: Any, title: str, x_label: str) -> None:
    axis.set_title(title, fontsize=LARGE, color=INK, loc="left", weight="bold", pad=8)
    axis.set_xlabel(x_label, fontsize=NORMAL, color=INK)
    plain_axes(axis)


def _mean_and_sd(values: np.ndarray) -> tuple[float, float]:
    """Return mean and sample standard deviation, NaN where there are too few."""
    return (
        float(values.mean()) if len(values) else float("nan"),
        float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
    )


def _bars_title(score_name: str) -> str:
    return f"Mean {score_name} by days between ECG and MRI"


def _bars_alt(bins: Sequence[IntervalBin], lines: Sequence[Sequence[Any]], score_name: str) -> str:
    parts = []
    for each in bins:
        means = [f"{float(line[3]):.3f} {line[1]}" for line in lines if line[0] == each.name]
        parts.append(
            f"{each.name} {', '.join(means)} (n = {len(each.case_ids)})" if each.case_ids else f"{each.name} no case"
        )
    return f"{_bars_title(score_name)}: {'; '.join(parts)}."


def _trend(days: np.ndarray, weights: np.ndarray) -> str:
    """Describe the correlation of weight and days, where both vary."""
    if len(days) < 3 or np.ptp(days) == 0 or np.ptp(weights) == 0:
        return ""
    return f"; its correlation with the days is {np.corrcoef(days, weights)[0, 1]:.2f}"
