"""What the days between an ECG and an image do: scores in bins of days, and how much the ECG weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.kernels import ShapeError

from .picture import BLUE, FAINT, INK, LARGE, NORMAL, ORANGE, PURPLE, SKY, SMALL, Picture, new_figure, save_picture
from .tables import number

EDGES_DAYS = (0, 7, 14, 21, 30, 60, 90)
"""Bins are half-open, but for the last, which holds its upper edge; the paper names only 7 to 14 days."""
_COLOURS = (BLUE, ORANGE, SKY, PURPLE)


def draw_interval_bars(
    scores: Mapping[str, Sequence[tuple[float, float]]],
    out: Path,
    *,
    name: str = "intervals",
    title: str = "Scar DSC by days between ECG and MRI",
    edges_days: Sequence[float] = EDGES_DAYS,
) -> Picture:
    """Draw the mean score of each bin of days, groups side by side, each score as a dot, into ``out/<name>.png``.

    Args:
        scores: pairs of days and score by the group's name, such as ``"with time"`` and ``"without time"``.
        out: folder to write into.
        name: of the files.
        title: of the picture.
        edges_days: of the bins, ascending.

    Raises:
        ShapeError: no group, or a case outside of all bins.
    """
    if not scores:
        raise ShapeError("draw_interval_bars: expected at least one group of scores, got none")
    bins = {group: _binned(pairs, edges_days) for group, pairs in scores.items()}
    labels = _bin_labels(edges_days)
    figure = new_figure(1.25 * len(labels) + 1.6, 3.9)
    axis = figure.subplots()
    width = 0.8 / len(bins)
    for place, (group, members) in enumerate(bins.items()):
        left = np.arange(len(labels)) - 0.4 + (place + 0.5) * width
        colour = _COLOURS[place % len(_COLOURS)]
        means = [float(np.mean(values)) if values else 0.0 for values in members]
        axis.bar(left, means, 0.92 * width, color=colour, label=group, zorder=2)
        for x, values in zip(left, members, strict=True):
            axis.plot([x] * len(values), values, "o", ms=3, mfc="white", mec=INK, mew=0.7, zorder=3)
    counts = [[len(members[at]) for members in bins.values()] for at in range(len(labels))]
    words = [f"n = {' / '.join(map(str, dict.fromkeys(n)))}" if any(n) else "no case" for n in counts]
    axis.set_xticks(range(len(labels)), [f"{label}\n{n}" for label, n in zip(labels, words, strict=True)])
    axis.set_ylim(0, 1)
    _dress(axis, title, "Days between ECG and MRI", "DSC, mean; dots are cases")
    if len(bins) > 1:
        axis.legend(fontsize=SMALL, frameon=False, ncols=len(bins), loc="upper right", bbox_to_anchor=(1, 1.13))
    lines = [
        [group, label, len(values), number(float(np.mean(values))) if values else ""]
        for group, members in bins.items()
        for label, values in zip(labels, members, strict=True)
    ]
    said = "; ".join(f"{group}, {label}: {mean} (n = {n})" for group, label, n, mean in lines if n)
    alt = f"Mean DSC in bins of days between ECG and MRI: {said or 'no case'}."
    return save_picture(figure, out, name, title, alt, ["group", "days", "cases", "mean_dsc"], lines)


def draw_gate_weights(days: Mapping[str, float], weights: Mapping[str, float], out: Path) -> Picture:
    """Draw the weight that the gate gives to each case's ECG against its days, into ``out/gate_weights.png``.

    Args:
        days: between ECG and image, by case.
        weights: of the ECG, in [0, 1], by case.
        out: folder to write into.
    """
    cases = list(days)
    x, y = np.array([days[case] for case in cases]), np.array([weights[case] for case in cases])
    figure = new_figure(6.2, 3.7)
    axis = figure.subplots()
    axis.axhline(0.5, color=FAINT, lw=0.8, ls="dashed", zorder=1)
    axis.plot(x, y, "o", ms=6, color=BLUE, mec="white", mew=0.7, zorder=2)
    margin = max(0.02, 0.15 * float(np.ptp(y)))
    axis.set_ylim(min(0.5, float(y.min())) - margin, max(0.5, float(y.max())) + margin)
    axis.set_xlim(-3, max(93.0, float(x.max()) + 3))
    title = "Weight of the ECG in the fusion's gate"
    _dress(axis, title, "Days between ECG and MRI", "Weight of the ECG (0.5: as the image)")
    lines = [[case, number(days[case]), number(weights[case])] for case in cases]
    alt = f"Weight of the ECG against days, {len(cases)} cases: {y.min():.3f} to {y.max():.3f}, mean {y.mean():.3f}."
    return save_picture(figure, out, "gate_weights", title, alt, ["case_id", "days", "ecg_weight"], lines)


def _binned(pairs: Sequence[tuple[float, float]], edges: Sequence[float]) -> list[list[float]]:
    """Return the scores of each bin."""
    bins: list[list[float]] = [[] for _ in edges[1:]]
    for days, score in pairs:
        if not edges[0] <= days <= edges[-1]:
            raise ShapeError(f"draw_interval_bars: expected days in [{edges[0]}, {edges[-1]}], got {days:g}")
        bins[min(int(np.searchsorted(edges, days, side="right")) - 1, len(bins) - 1)].append(score)
    return bins


def _bin_labels(edges: Sequence[float]) -> list[str]:
    halves = [f"[{low:g}, {high:g})" for low, high in zip(edges, edges[1:], strict=False)]
    return [*halves[:-1], halves[-1].replace(")", "]")]


def _dress(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=LARGE, color=INK, loc="left", weight="bold")
    axis.set_xlabel(x, fontsize=NORMAL, color=INK)
    axis.set_ylabel(y, fontsize=NORMAL, color=INK)
    axis.tick_params(labelsize=SMALL, labelcolor=INK)
    axis.grid(axis="y", color="#DDDDDD", lw=0.6, zorder=0)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
