"""Bull's-eyes: a volume for each of the 17 segments of the left ventricle, seen from the apex.

Rings from outside: basal 1-6, mid 7-12, apical 13-16, the apex 17 in the middle; anterior is up, the septum left.

Source: Cerqueira et al. (2002), "Standardized myocardial segmentation and nomenclature for tomographic imaging of the
heart", Circulation 105.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trifuse.architectures.storage.segment_maps import AHA_SEGMENTS
from trifuse.kernels import DataError, ShapeError

from .picture import FAINT, INK, LARGE, NORMAL, SMALL, Picture, new_figure, save_picture
from .tables import number

_WALLS = ("anterior", "anteroseptal", "inferoseptal", "inferior", "inferolateral", "anterolateral")
SEGMENT_NAMES = (
    *(f"basal {wall}" for wall in _WALLS),
    *(f"mid {wall}" for wall in _WALLS),
    *(f"apical {wall}" for wall in ("anterior", "septal", "inferior", "lateral")),
    "apex",
)
# Of each ring: its segments, inner and outer radius, and where the first of them begins, in degrees anticlockwise from
# three o'clock, as the others follow.
RINGS = (
    (range(1, 7), 0.74, 1.0, 60.0),
    (range(7, 13), 0.48, 0.74, 60.0),
    (range(13, 17), 0.22, 0.48, 45.0),
    (range(17, 18), 0.0, 0.22, 0.0),
)
COLOURS = "YlOrBr"  # from light to dark, so that any colour vision and a grey print tell its order
SIGNED_COLOURS = "PuOr"  # light at zero, and of two hues that any colour vision tells apart
PER_ROW = 4
LETTERS = 36  # that fit above one


def draw_bullseyes(
    burdens: Mapping[str, ArrayLike],
    out: Path,
    *,
    title: str,
    quantity: str = "scar volume",
    unit: str = "mL",
    unassigned: Mapping[str, float] | None = None,
) -> Picture:
    """Draw one bull's-eye or several, on one scale of colours, into ``out/bullseye.png``.

    Args:
        burdens: for each name, such as ``"truth"``, the 17 values of segments 1 to 17, none negative.
        out: folder to write into.
        title: of the picture.
        quantity: what the values are.
        unit: their unit.
        unassigned: for each name, what lies in no segment; printed under its bull's-eye.

    Raises:
        ShapeError: there are not 17 values.
        DataError: there is no bull's-eye, or a value is negative or not finite.
    """
    eyes = {name: _checked(name, values) for name, values in burdens.items()}
    if not eyes:
        raise DataError("bull's-eye", "values", got="none", want="17 of them, for one name at least")
    top = max(float(values.max()) for values in eyes.values()) or 1.0
    rows, columns = math.ceil(len(eyes) / PER_ROW), min(PER_ROW, len(eyes))
    figure = new_figure(3.6 * columns + 1.0, 4.15 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, eyes.items(), strict=False):
        draw_bullseye(axis, values, top)
        axis.set_title(
            textwrap.fill(name, LETTERS, break_on_hyphens=False),
            fontsize=LARGE,
            color=INK,
            weight="bold",
            parse_math=False,
        )
        _write_sums(axis, values.sum(), None if unassigned is None else unassigned[name], unit)
    _draw_scale(figure, axes, top, f"{quantity} ({unit})")
    figure.suptitle(
        textwrap.fill(title, LETTERS * columns, break_on_hyphens=False), fontsize=LARGE, color=INK, parse_math=False
    )

    header = ["segment", "name", *(f"{name} ({unit})" for name in eyes)]
    lines: list[list[object]] = [
        [segment, SEGMENT_NAMES[segment - 1], *(number(values[segment - 1]) for values in eyes.values())]
        for segment in range(1, AHA_SEGMENTS + 1)
    ]
    if unassigned is not None:
        lines.append(["", "unassigned", *(number(unassigned[name]) for name in eyes)])
    sentences = "; ".join(_sentence(name, values, unit) for name, values in eyes.items())
    alt = f"Bull's-eyes of the left ventricle's 17 segments, {quantity} in {unit}: {sentences}."
    return save_picture(figure, out, "bullseye", title, alt, header, lines)


def draw_ecg_bullseye(
    burdens: Mapping[str, ArrayLike],
    scores: ArrayLike,
    out: Path,
    *,
    title: str,
    quantity: str = "scar volume",
    unit: str = "mL",
) -> Picture:
    """Draw what an ECG says of each segment beside the image's bull's-eyes, into ``out/ecg_bullseye.png``.

    Args:
        burdens: for each name, such as ``"truth"``, the 17 values of segments 1 to 17, none negative.
        scores: the ECG's score of each segment, of either sign; see `TemporalAwareFusion.segment_scores`.
        out: folder to write into.
        title: of the picture.
        quantity: what the values of ``burdens`` are.
        unit: their unit.

    Raises:
        ShapeError: there are not 17 values.
        DataError: there is no bull's-eye beside the ECG's, a burden is negative, or a value is not finite.
    """
    eyes = {name: _checked(name, values) for name, values in burdens.items()}
    ecg = _checked("ECG", scores, signed=True)
    if not eyes:
        raise DataError("bull's-eye", "values", got="none", want="17 of them, for one name at least")
    top, most = max(float(values.max()) for values in eyes.values()) or 1.0, float(np.abs(ecg).max()) or 1.0
    figure = new_figure(3.6 * (len(eyes) + 1) + 2.0, 4.55)
    axes = figure.subplots(1, len(eyes) + 1, squeeze=False)
    for axis, (name, values) in zip(axes.flat, eyes.items(), strict=False):
        draw_bullseye(axis, values, top)
        _write_sums(axis, values.sum(), None, unit)
        axis.set_title(textwrap.fill(name, LETTERS), fontsize=LARGE, color=INK, weight="bold", parse_math=False)
    last = axes.flat[-1]
    draw_bullseye(last, ecg, most, signed=True)
    last.set_title("the ECG", fontsize=LARGE, color=INK, weight="bold")
    note = "differences between segments count;\nwhat a sign means is learnt"
    last.text(0, -1.18, note, fontsize=NORMAL, color=INK, ha="center", va="top", linespacing=1.4)
    for axis in axes.flat:
        axis.set_axis_off()
    _draw_scale(figure, axes[:, :-1], top, f"{quantity} ({unit})")
    _draw_scale(figure, axes[:, -1:], most, "score of the ECG", signed=True)
    figure.suptitle(textwrap.fill(title, LETTERS * (len(eyes) + 1)), fontsize=LARGE, color=INK, parse_math=False)

    header = ["segment", "name", *(f"{name} ({unit})" for name in eyes), "ECG (score)"]
    lines: list[list[object]] = [
        [segment, SEGMENT_NAMES[segment - 1], *(number(values[segment - 1]) for values in (*eyes.values(), ecg))]
        for segment in range(1, AHA_SEGMENTS + 1)
    ]
    high, low = int(ecg.argmax()), int(ecg.argmin())
    said = (
        f"the ECG scores segment {high + 1} ({SEGMENT_NAMES[high]}) highest, {_short(ecg[high])}, and segment "
        f"{low + 1} ({SEGMENT_NAMES[low]}) lowest, {_short(ecg[low])}"
    )
    sentences = "; ".join(_sentence(name, values, unit) for name, values in eyes.items())
    alt = f"Bull's-eyes of the left ventricle's 17 segments, {quantity} in {unit}: {sentences}; {said}."
    return save_picture(figure, out, "ecg_bullseye", title, alt, header, lines)


def draw_bullseye(axis: Any, values: NDArray[np.float64], top: float, *, signed: bool = False) -> None:
    """Draw the 17 segments with numbers and values onto an empty axis, coloured from 0, or else -top, to ``top``."""
    from matplotlib import colormaps
    from matplotlib.patches import Wedge

    colours = colormaps[SIGNED_COLOURS if signed else COLOURS]
    for segments, inner, outer, start in RINGS:
        width = 360 / len(segments)
        for place, segment in enumerate(segments):
            value = float(values[segment - 1])
            colour = colours((value / top + 1) / 2 if signed else value / top)
            begin = start + place * width
            wedge = Wedge((0, 0), outer, begin, begin + width, width=outer - inner, fc=colour, ec=FAINT, lw=0.8)
            axis.add_patch(wedge)
            middle, radius = math.radians(begin + width / 2), (inner + outer) / 2 if inner else 0.0
            x, y = radius * math.cos(middle), radius * math.sin(middle)
            ink = {"color": readable_ink(colour), "ha": "center"}
            axis.text(x, y + 0.015, str(segment), fontsize=SMALL - 2, va="bottom", **ink)
            axis.text(x, y + 0.005, _short(value), fontsize=SMALL, va="top", weight="bold", **ink)
    for x, y, wall, turn in (
        (0, 1.07, "anterior", 0),
        (0, -1.07, "inferior", 0),
        (-1.07, 0, "septal", 90),
        (1.07, 0, "lateral", 270),
    ):
        axis.text(x, y, wall, fontsize=SMALL, color=FAINT, ha="center", va="center", rotation=turn)
    axis.set_xlim(-1.15, 1.15)
    axis.set_ylim(-1.5, 1.15)  # below: what is in all segments and in none
    axis.set_aspect("equal")


def readable_ink(colour: tuple[float, ...]) -> str:
    """Return black or white, whichever contrasts more with a colour (red, green, blue; 0 to 1)."""
    return "black" if contrast(colour, (0, 0, 0)) >= contrast(colour, (1, 1, 1)) else "white"


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Return the contrast ratio of two colours, 1 to 21.

    Source: W3C, "Web content accessibility guidelines 2.1", relative luminance and contrast ratio.
    """
    darker, lighter = sorted(_luminance(colour) for colour in (first, second))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: tuple[float, ...]) -> float:
    values = np.array(colour[:3])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _checked(name: str, values: ArrayLike, *, signed: bool = False) -> NDArray[np.float64]:
    checked = np.asarray(values, float)
    if checked.shape != (AHA_SEGMENTS,):
        raise ShapeError(f"bull's-eye {name!r} needs {AHA_SEGMENTS} values, one for each segment, got {checked.shape}")
    if not (np.isfinite(checked).all() and (signed or (checked >= 0).all())):
        want = "finite values" if signed else "finite values, none below 0"
        raise DataError(f"bull's-eye {name!r}", "values", got=checked.tolist(), want=want)
    return checked


def _write_sums(axis: Any, total: float, unassigned: float | None, unit: str) -> None:
    text = f"in all segments {_short(total)} {unit}"
    if unassigned is not None:
        text += f"\nunassigned {_short(unassigned)} {unit}"
    axis.text(0, -1.18, text, fontsize=NORMAL, color=INK, ha="center", va="top", linespacing=1.4)


def _draw_scale(figure: Any, axes: Any, top: float, label: str, *, signed: bool = False) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shades = ScalarMappable(Normalize(-top if signed else 0, top), SIGNED_COLOURS if signed else COLOURS)
    bar = figure.colorbar(shades, ax=axes, shrink=0.7, aspect=22, pad=0.02)
    bar.set_label(label, fontsize=NORMAL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=INK)
    bar.outline.set_visible(False)


def _sentence(name: str, values: NDArray[np.float64], unit: str) -> str:
    if not values.any():
        return f"{name} none in any segment"
    most = int(values.argmax())
    peak = f"most in segment {most + 1} ({SEGMENT_NAMES[most]}), {_short(values[most])} {unit}"
    return f"{name} {_short(values.sum())} {unit} in all, {peak}"


def _short(value: float) -> str:
    """Return a value as it fits into a segment."""
    if 0 < abs(value) < 0.005:
        return "<0.01" if value > 0 else ">-0.01"
    return "0" if value == 0 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
