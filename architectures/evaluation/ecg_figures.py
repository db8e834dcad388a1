"""The twelve leads of a heart beat on ECG paper: 25 mm/s and 10 mm/mV, the arrangement every cardiologist reads."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from trifuse.architectures.data.ecg.median_beat import Beat
from trifuse.architectures.data.ecg.signal import LEADS, RATE_HZ

from .picture import FAINT, INK, LARGE, NORMAL, SMALL, VERMILION, Picture, new_figure, save_picture
from .tables import number

MM_PER_S, MM_PER_MV = 25, 10
PAPER, FINE_LINE, STRONG_LINE = "#FFFBFA", "#FBE0DB", "#F0AFA6"
ROWS, COLUMNS = 3, 4  # I, II, III stand above each other, then aVR, aVL, aVF, then V1 to V3, V4 to V6
GAP_MM = 5
INCH_PER_MM = 0.062
LONGEST_LINE = 110


def draw_ecg(beat: Beat, out: Path, *, name: str = "ecg") -> Picture:
    """Draw the twelve leads of a beat into ``<name>.png``, its samples into ``<name>.csv``.

    Args:
        beat: from ``median_beat`` or ``load_beat``. A lead that is not usable is marked instead of drawn.
        out: folder to write into.
        name: of both files, without suffix.
    """
    time_s = (np.arange(beat.signal_mv.shape[1]) - int(0.4 * RATE_HZ)) / RATE_HZ
    baselines, height = _baselines(beat)
    width = COLUMNS * (time_s.size / RATE_HZ * MM_PER_S + GAP_MM) + 2 * GAP_MM
    title = f"{Path(beat.name).name or 'ECG'}: {_what(beat)}"
    notes = [line for note in beat.notes for line in wrap(note, LONGEST_LINE)]
    figure = new_figure(width * INCH_PER_MM, height * INCH_PER_MM + 0.7 + 0.16 * len(notes))
    axis = figure.subplots()
    _draw_paper(axis, width, height)
    for row, lead in enumerate(LEADS):
        column, line = divmod(row, ROWS)
        left = 2 * GAP_MM + column * (width - 2 * GAP_MM) / COLUMNS
        x, y = left + (time_s - time_s[0]) * MM_PER_S, baselines[line]
        _draw_lead(axis, lead, x, y, beat.signal_mv[row] * MM_PER_MV, bool(beat.usable[row]))
    for y in baselines:
        _draw_calibration(axis, y)
    axis.set_title(title, fontsize=LARGE, color=INK, loc="left", weight="bold")
    scale = f"{MM_PER_S} mm/s, {MM_PER_MV} mm/mV: a small square is 0.04 s and 0.1 mV"
    axis.set_xlabel("\n".join([scale, *notes]), fontsize=SMALL, color=FAINT, loc="left")
    lines = ([number(t), *(number(v) for v in samples)] for t, samples in zip(time_s, beat.signal_mv.T, strict=True))
    header = ["time_s", *(f"{lead}_mV" for lead in LEADS)]
    return save_picture(figure, out, name, title, _alt(beat), header, lines)


def _what(beat: Beat) -> str:
    """Describe the beat that is drawn."""
    median = f"median of {beat.beats} beats" if beat.beats > 1 else "one beat"
    rate = f", {beat.heart_rate_bpm:.0f}/min" if beat.heart_rate_bpm else ""
    return f"{median}{rate}, {int(beat.usable.sum())} of {len(LEADS)} leads usable"


def _alt(beat: Beat) -> str:
    heights = beat.signal_mv[:, int(0.3 * RATE_HZ) : int(0.5 * RATE_HZ)]
    tallest = int(np.abs(heights).max(1).argmax())
    unused = [lead for lead, usable in zip(LEADS, beat.usable, strict=True) if not usable]
    masked = f" Not usable: {', '.join(unused)}." if unused else ""
    peak = heights[tallest][np.abs(heights[tallest]).argmax()]
    return f"Twelve-lead ECG, {_what(beat)}. The tallest QRS is in {LEADS[tallest]}, {peak:.2f} mV.{masked}"


def _baselines(beat: Beat) -> tuple[list[float], float]:
    """Return where the zero lines of the three rows lie, in mm from the paper's lower edge, and the paper's height."""
    mm = beat.signal_mv.reshape(COLUMNS, ROWS, -1) * MM_PER_MV
    above = np.maximum(mm.max((0, 2)), 8) + 4  # room for the lead's name
    below = np.maximum(-mm.min((0, 2)), 5) + 3
    height = 5 * float(np.ceil((above.sum() + below.sum()) / 5))
    tops = height - np.concatenate(([0], np.cumsum(above + below)[:-1]))
    return [float(round(top - up)) for top, up in zip(tops, above, strict=True)], height


def _draw_paper(axis: Any, width: float, height: float) -> None:
    axis.set_facecolor(PAPER)
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.set_aspect("equal")
    for every, colour, thickness in ((1, FINE_LINE, 0.4), (5, STRONG_LINE, 0.6)):
        axis.vlines(np.arange(0, width + 1, every), 0, height, color=colour, lw=thickness, zorder=0)
        axis.hlines(np.arange(0, height + 1, every), 0, width, color=colour, lw=thickness, zorder=0)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(STRONG_LINE)


def _draw_lead(axis: Any, lead: str, x_mm: np.ndarray, y_mm: float, trace_mm: np.ndarray, usable: bool) -> None:
    axis.text(x_mm[0] + 0.5, y_mm + 5, lead, fontsize=NORMAL, color=INK, weight="bold", va="bottom")
    if usable:
        axis.plot(x_mm, y_mm + trace_mm, color=INK, lw=1.0, solid_joinstyle="round")
        return
    axis.plot(x_mm[[0, -1]], [y_mm, y_mm], color=VERMILION, lw=1.0, ls="--")
    axis.text(x_mm.mean(), y_mm + 1, "not usable", fontsize=SMALL, color=VERMILION, ha="center", va="bottom")


def _draw_calibration(axis: Any, y_mm: float) -> None:
    """Draw the pulse of 1 mV and 0.2 s that every ECG begins with."""
    axis.plot([2, 3, 3, 8, 8, 9], y_mm + np.array([0, 0, 1, 1, 0, 0]) * MM_PER_MV, color=INK, lw=1.0)
