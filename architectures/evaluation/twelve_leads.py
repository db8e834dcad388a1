"""The grid of a twelve-lead picture: the leads where a print has them, one scale for all."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.data.ecg import LEADS

from .picture import FAINT, INK, LARGE, NORMAL, SMALL, new_figure

ROWS, COLUMNS = 3, 4  # I, II, III below each other, then aVR, aVL, aVF, V1 to V3, V4 to V6
BEAT_START_MS = -408.0  # of a padded beat, from the R peak


def times_ms(steps: int, rate_hz: float, start_ms: float) -> NDArray:
    """Return the times of samples, from the R peak."""
    return start_ms + 1000 / rate_hz * np.arange(steps)


def lead_axes(title: str, time_ms: NDArray, signals: NDArray) -> tuple[Any, list[Any]]:
    """Return a figure and the axes of the twelve leads, in their order.

    Args:
        title: of the picture.
        time_ms: what the horizontal axis spans.
        signals: all values that will be drawn, which the vertical axis spans.
    """
    from matplotlib.ticker import MultipleLocator

    figure = new_figure(11.0, 6.2)
    grid = figure.subplots(ROWS, COLUMNS, sharex=True, sharey=True)
    axes = [grid[lead % ROWS, lead // ROWS] for lead in range(len(LEADS))]
    for axis, lead in zip(axes, LEADS, strict=True):
        axis.axvline(0, color="#D0D0D0", lw=0.8, zorder=0)
        axis.axhline(0, color="#E3E3E3", lw=0.8, zorder=0)
        axis.text(0.02, 0.95, lead, transform=axis.transAxes, fontsize=LARGE, color=INK, weight="bold", va="top")
        axis.xaxis.set_major_locator(MultipleLocator(200))
        axis.tick_params(labelsize=SMALL, colors=INK)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(FAINT)
    low, high = float(signals.min()), float(signals.max())
    margin = 0.06 * ((high - low) or 1.0)
    axes[0].set_ylim(low - margin, high + margin)
    axes[0].set_xlim(float(time_ms[0]), float(time_ms[-1]))
    for axis in grid[-1]:
        axis.set_xlabel("Time from R peak (ms)", fontsize=NORMAL, color=INK)
    for axis in grid[:, 0]:
        axis.set_ylabel("Signal (SD of the lead)", fontsize=NORMAL, color=INK)
    figure.suptitle(title, fontsize=LARGE, color=INK, weight="bold", x=0.01, ha="left")
    return figure, axes
