"""The grid of a twelve-lead figure: the leads arranged as on a printed ECG, one scale for all."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.data.ecg.signal import LEADS

from .picture import FAINT, INK, LARGE, NORMAL, SMALL, new_figure

ROWS, COLUMNS = 3, 4  # I, II, III below each other, then aVR, aVL, aVF, V1 to V3, V4 to V6
BEAT_START_MS = -408.0  # of a padded beat, from the R peak
TICK_MS = 200
_EDGES = {"left": 0.055, "top": 0.935, "bottom": 0.085, "wspace": 0.07, "hspace": 0.09}
_BAR = (0.93, 0.085, 0.012, 0.85)


def times_ms(steps: int, rate_hz: float, start_ms: float) -> NDArray:
    """Return the times of samples, from the R peak."""
    return start_ms + 1000 / rate_hz * np.arange(steps)


def lead_axes(title: str, time_ms: NDArray, signals: NDArray, *, bar: bool = False) -> tuple[Any, list[Any], Any]:
    """Return a figure, the axes of the twelve leads in their order, and those of a colour bar, where there is one.

    Everything has a fixed position: arranging twelve axes automatically takes longer than drawing them.

    Args:
        title: of the picture.
        time_ms: what the horizontal axis spans.
        signals: all values that will be drawn, which the vertical axis spans.
        bar: whether there is to be room for a colour bar.
    """
    figure = new_figure(11.0, 6.2)
    figure.set_layout_engine(None)
    grid = figure.subplots(ROWS, COLUMNS, sharex=True, sharey=True)
    figure.subplots_adjust(**_EDGES, right=0.915 if bar else 0.985)
    axes = [grid[lead % ROWS, lead // ROWS] for lead in range(len(LEADS))]
    for axis, lead in zip(axes, LEADS, strict=True):
        axis.axvline(0, color="#D0D0D0", lw=0.8, zorder=0)
        axis.axhline(0, color="#E3E3E3", lw=0.8, zorder=0)
        axis.text(0.02, 0.95, lead, transform=axis.transAxes, fontsize=LARGE, color=INK, weight="bold", va="top")
        axis.tick_params(labelsize=SMALL, colors=INK)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(FAINT)
    low, high = float(signals.min()), float(signals.max())
    margin = 0.06 * ((high - low) or 1.0)
    axes[0].set_ylim(low - margin, high + margin)
    first, last = float(time_ms[0]), float(time_ms[-1])
    axes[0].set_xlim(first, last)
    axes[0].set_xticks([at for at in range(-2000, 2001, TICK_MS) if first + TICK_MS / 2 < at < last - TICK_MS / 2])
    for axis in grid[-1]:
        axis.set_xlabel("Time from R peak (ms)", fontsize=NORMAL, color=INK)
    for axis in grid[:, 0]:
        axis.set_ylabel("Signal (SD of the lead)", fontsize=NORMAL, color=INK)
    figure.suptitle(title, fontsize=LARGE, color=INK, weight="bold", x=0.01, y=0.985, ha="left")
    return figure, axes, figure.add_axes(_BAR) if bar else None
