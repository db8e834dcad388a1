"""The overlay sheet: slices of the best and the worst cases, image beside truth beside prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.volumes.nifti import read_labels
from trifuse.kernels import DataError

from .metrics import case_metrics
from .picture import (
    BLUE,
    BROWN,
    FAINT,
    GREEN,
    INK,
    LARGE,
    LIME,
    NORMAL,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILION,
    VIOLET,
    YELLOW,
    Picture,
    new_figure,
    save_picture,
)
from .scoring import EXTRA, Row, prediction_path
from .summary import SCAR, headline_scores
from .tables import number

CLASS_COLOURS = (SKY, ORANGE, YELLOW, PURPLE, GREEN, VERMILION, BLUE, VIOLET, LIME, BROWN)
FEW = 3  # more classes than this are also told apart by their numbers
PLATE = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "boxstyle": "round,pad=0.3"}
LONGEST_NAME = 60  # letters of a case's name that fit above its row
LONGEST_HEADING = 28  # letters that fit above a column


@dataclass(frozen=True, eq=False)
class Tile:
    """One slice of one case: image, truth and prediction of shape (H, W), class ids; None for no prediction.

    ``spacing_mm`` is that of rows and columns; None where it is not known.
    """

    case_id: str
    note: str
    slice: int
    depth: int
    image: NDArray
    truth: NDArray
    prediction: NDArray | None
    spacing_mm: tuple[float, float] | None
    dsc: float
    score_name: str = "DSC"

    @property
    def pixel(self) -> tuple[float, float]:
        """Height and width of a pixel, in mm or, without a spacing, in pixels."""
        return self.spacing_mm or (1.0, 1.0)


def collect_tiles(
    pred_dir: Path,
    cohort: Cohort,
    rows: Sequence[Row],
    *,
    limit: int = 6,
    slice_index: int | None = None,
) -> list[Tile]:
    """Choose cases of a case table by the DSC that speaks for them, and cut one slice out of each, the worst first.

    All cases when there are at most ``limit``; otherwise that many, evenly spaced by rank, the best and the worst
    among them. The slice is, of those that show most classes, the one with the largest true area; or ``slice_index``,
    counted from 0.
    """
    means = headline_scores([row for row in rows if row.status != EXTRA], "dsc")
    chosen = choose_cases(means, limit)
    return [cut_tiles([pred_dir], cohort, case_id, note, [means[case_id]], slice_index)[0] for case_id, note in chosen]


def cut_tiles(
    pred_dirs: Sequence[Path], cohort: Cohort, case_id: str, note: str, dscs: Sequence[float], slice_index: int | None
) -> list[Tile]:
    """Cut one slice of a case, chosen as in `collect_tiles`: a tile for each folder of predictions and its DSC."""
    image, truth = load_case(cohort, cohort.case(case_id))
    assert truth is not None  # a case without a label has no row
    depth = len(truth.voxels)
    index = _telling_slice(truth.voxels) if slice_index is None else min(slice_index, depth - 1)
    spacing_mm = truth.spacing_mm[1:] if cohort.has_spacing else None
    tiles = []
    for pred_dir, dsc in zip(pred_dirs, dscs, strict=True):
        try:
            prediction = read_labels(prediction_path(pred_dir, case_id), like=truth).voxels[index]
        except DataError:
            prediction = None
        slice_of = image.voxels[index], truth.voxels[index], prediction
        name = "scar DSC" if SCAR in cohort.class_names else "DSC"
        tiles.append(Tile(case_id, note, index, depth, *slice_of, spacing_mm, dsc, name))
    return tiles


def draw_overlays(
    tiles: Sequence[Tile], class_names: Sequence[str], out: Path, *, title: str = "Predictions beside the truth"
) -> Picture:
    """Draw one row per case (image, truth, prediction with the DSC on it) into ``out/overlays.png``.

    Each class has a colour and, where there are many, a number; dashed lines on the prediction are the true outlines.

    Args:
        tiles: what to show, e.g. from `collect_tiles`.
        class_names: names of the class ids, the background first.
        out: folder to write into.
        title: of the picture.
    """
    figure = draw_sheet([[tile] for tile in tiles], ["Prediction"], class_names)
    header = ["case_id", "slice", "class_name", "pixels_truth", "pixels_prediction", "dsc_slice", "dsc_case"]
    lines = [line for tile in tiles for line in tile_numbers(tile, class_names)]
    cases = ", ".join(f"{tile.case_id} {dsc_text(tile.dsc)}" for tile in tiles)
    alt = (
        f"Overlay sheet of {len(tiles)} cases, image, truth and prediction side by side; "
        f"{score_name(tiles)} of each case: {cases}."
    )
    return save_picture(figure, out, "overlays", title, alt, header, lines)


def draw_sheet(rows: Sequence[Sequence[Tile]], headings: Sequence[str], class_names: Sequence[str]) -> Any:
    """Return a figure of one row per case: image, truth, and each of the case's predictions under its heading."""
    windows = [_window(*row) for row in rows]
    aspects = [_aspect(row[0], window) for row, window in zip(rows, windows, strict=True)]
    shown = _shown_classes([tile for row in rows for tile in row], len(class_names))
    columns = 2 + len(headings)
    in_legend = min(columns + 1, len(shown) + 1)
    width, lines = 2.6, math.ceil((len(shown) + 1) / in_legend)
    figure = new_figure(columns * width + 0.2, sum(width * aspect + 0.26 for aspect in aspects) + 0.55 + 0.2 * lines)
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": aspects})
    for axis in axes.flat:
        axis.set_anchor("S")  # spare height belongs to the headings
    for line, row, window in zip(axes, rows, windows, strict=True):
        _draw_tile_row(line, row, window, numbered=len(shown) > FEW)
    _draw_headings(axes[0], ["Image", "Truth", *headings])
    handles = _legend(shown, class_names)
    look = {"fontsize": SMALL, "facecolor": "#4A4A4A", "labelcolor": "white", "edgecolor": "none"}
    for text in figure.legend(handles=handles, loc="outside lower center", ncols=in_legend, **look).get_texts():
        text.set_parse_math(False)
    return figure


def _draw_headings(axes: Sequence[Any], headings: Sequence[str]) -> None:
    place = {"xytext": (0, 19), "xycoords": "axes fraction", "textcoords": "offset points"}
    look = {"ha": "center", "va": "bottom", "fontsize": LARGE, "color": INK, "weight": "bold", "parse_math": False}
    for axis, heading in zip(axes, headings, strict=True):
        axis.annotate(_shortened(heading, LONGEST_HEADING), (0.5, 1), **place, **look)


def _telling_slice(labels: NDArray) -> int:
    """Return the slice that shows most classes, and of several the one with the largest area."""
    classes = [np.unique(plane[plane != 0]).size for plane in labels]
    areas = (labels != 0).sum((1, 2)).tolist()
    return max(range(len(labels)), key=lambda index: (classes[index], areas[index]))


def _draw_tile_row(line: Sequence[Any], tiles: Sequence[Tile], window: tuple[slice, slice], *, numbered: bool) -> None:
    tile = tiles[0]
    image = tile.image[window]
    low, high = np.percentile(image, (1, 99.5))
    height, width = tile.pixel
    for axis in line:
        axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=height / width)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    _draw_scale_bar(line[0], image.shape, width, "pixels" if tile.spacing_mm is None else "mm")
    note = f" ({tile.note})" if tile.note else ""
    label = f"{_shortened(tile.case_id, LONGEST_NAME)}, slice {tile.slice + 1} of {tile.depth}{note}"
    line[0].set_title(label, fontsize=SMALL, color=FAINT, loc="left", pad=3, parse_math=False)
    _draw_masks(line[1], tile.truth[window], numbered=numbered)
    for axis, predicted in zip(line[2:], tiles, strict=True):
        _draw_prediction(axis, predicted, window, numbered=numbered)


def _draw_prediction(axis: Any, tile: Tile, window: tuple[slice, slice], *, numbered: bool) -> None:
    if tile.prediction is None:
        middle = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, "no prediction", color="white", fontsize=NORMAL, bbox=PLATE, **middle)
    else:
        _draw_masks(axis, tile.prediction[window], numbered=numbered)
        truth = tile.truth[window]
        for k in _classes_in(truth):
            _draw_contour(axis, truth == k, "white", 1.0, "dashed")
    corner = {"transform": axis.transAxes, "va": "top", "weight": "bold"}
    axis.text(
        0.04, 0.96, f"{tile.score_name} {dsc_text(tile.dsc)}", color="white", fontsize=NORMAL, bbox=PLATE, **corner
    )


def _shown_classes(tiles: Sequence[Tile], classes: int) -> list[int]:
    maps = [labels for tile in tiles for labels in (tile.truth, tile.prediction) if labels is not None]
    drawn = {k for labels in maps for k in _classes_in(labels)}
    return [k for k in range(1, classes) if k in drawn] or [1]


def _legend(shown: Sequence[int], class_names: Sequence[str]) -> list[Any]:
    """Return a line for each class that is drawn, and one for the true outline."""
    from matplotlib.lines import Line2D

    numbers = [f"{k} " if len(shown) > FEW else "" for k in shown]
    handles = [
        Line2D([], [], color=_class_colour(k), lw=2, label=number + class_names[k])
        for k, number in zip(shown, numbers, strict=True)
    ]
    return [*handles, Line2D([], [], color="white", lw=1.2, ls="--", label="true outline, on the prediction")]


def _classes_in(labels: NDArray) -> list[int]:
    return [int(value) for value in np.unique(labels) if value]


def _draw_masks(axis: Any, labels: NDArray, *, numbered: bool) -> None:
    from matplotlib.colors import to_rgb

    for k in _classes_in(labels):
        tint = np.zeros((*labels.shape, 4))
        tint[labels == k] = (*to_rgb(_class_colour(k)), 0.35)
        axis.imshow(tint, aspect=axis.get_aspect(), interpolation="nearest")
        _draw_contour(axis, labels == k, _class_colour(k), 1.5, "solid")
    for k in _classes_in(labels) if numbered else ():
        _draw_number(axis, k, labels == k)


def _draw_number(axis: Any, k: int, mask: NDArray) -> None:
    """Write a class's number on its pixel nearest to its middle."""
    from matplotlib import patheffects

    places = np.argwhere(mask)
    row, column = places[((places - places.mean(0)) ** 2).sum(1).argmin()]
    text = axis.text(column, row, str(k), color="white", fontsize=SMALL - 1, ha="center", va="center", weight="bold")
    text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])


def _draw_contour(axis: Any, mask: NDArray, colour: str, width: float, style: str) -> None:
    from matplotlib import patheffects

    if not mask.any():
        return
    closed = np.pad(mask, 1).astype(float)  # so that a mask at the edge of the tile has a closed outline
    rows, columns = np.arange(-1, mask.shape[0] + 1), np.arange(-1, mask.shape[1] + 1)
    outline = axis.contour(columns, rows, closed, levels=[0.5], colors=[colour], linewidths=width, linestyles=style)
    outline.set_path_effects([patheffects.withStroke(linewidth=width + 1.2, foreground="black", alpha=0.6)])
    axis.set_xlim(-0.5, mask.shape[1] - 0.5)
    axis.set_ylim(mask.shape[0] - 0.5, -0.5)


def _draw_scale_bar(axis: Any, shape: Sequence[int], pixel: float, unit: str) -> None:
    from matplotlib import patheffects

    height, width = shape
    length = next((step for step in (100, 50, 20, 10, 5) if step / pixel <= width / 2.5), 1)
    start, y = 0.06 * width, 0.93 * height
    dark_rim = [patheffects.withStroke(linewidth=4, foreground="black", alpha=0.6)]
    bar = axis.plot([start, start + length / pixel], [y, y], color="white", lw=2, solid_capstyle="butt")[0]
    text = axis.text(start, y - 0.025 * height, f"{length} {unit}", color="white", fontsize=SMALL, va="bottom")
    bar.set_path_effects(dark_rim)
    text.set_path_effects(dark_rim)


def choose_cases(dsc: Mapping[str, float], limit: int) -> list[tuple[str, str]]:
    """Return (case, worst / median / best) of the cases that `collect_tiles` shows, by their DSC."""
    ranked = sorted(dsc, key=lambda case_id: (math.inf if math.isnan(dsc[case_id]) else dsc[case_id], case_id))
    places = range(len(ranked)) if len(ranked) <= limit else np.linspace(0, len(ranked) - 1, limit).round().astype(int)
    notes = {0: "worst", len(ranked) - 1: "best"} if len(ranked) > 2 else {}
    if len(ranked) % 2 and len(ranked) > 2:
        notes[len(ranked) // 2] = "median"
    return [(ranked[i], notes.get(int(i), "")) for i in places]


def _window(*tiles: Tile) -> tuple[slice, slice]:
    """Return a square (in mm or pixels) around all that is labelled, with a margin; the whole slice if nothing is."""
    tile = tiles[0]
    labelled = tile.truth != 0
    for predicted in tiles:
        if predicted.prediction is not None:
            labelled = labelled | (predicted.prediction != 0)
    if not labelled.any():
        return slice(None), slice(None)
    spans = [np.flatnonzero(labelled.any(axis=other)) for other in (1, 0)]
    field = [n * step for n, step in zip(labelled.shape, tile.pixel, strict=True)]
    largest = max((span[-1] - span[0] + 1) * step for span, step in zip(spans, tile.pixel, strict=True))
    side = max(1.8 * largest, 0.4 * max(field))
    window = []
    for span, step, n in zip(spans, tile.pixel, labelled.shape, strict=True):
        length = min(n, math.ceil(side / step))
        start = min(max(0, round((span[0] + span[-1] + 1 - length) / 2)), n - length)
        window.append(slice(start, start + length))
    return window[0], window[1]


def _aspect(tile: Tile, window: tuple[slice, slice]) -> float:
    height, width = tile.image[window].shape
    return height * tile.pixel[0] / (width * tile.pixel[1])


def tile_numbers(tile: Tile, class_names: Sequence[str]) -> list[list[object]]:
    """Return a line for each class: its areas in the slice, its DSC there, and the case's own on the tile."""
    prediction = np.zeros_like(tile.truth) if tile.prediction is None else tile.prediction
    lines: list[list[object]] = []
    for k, name in enumerate(class_names[1:], start=1):
        mine, true = prediction == k, tile.truth == k
        areas, dsc = (int(true.sum()), int(mine.sum())), case_metrics(mine, true, None)["dsc"]
        lines.append([tile.case_id, tile.slice, name, *areas, number(dsc), number(tile.dsc)])
    return lines


def _class_colour(k: int) -> str:
    return CLASS_COLOURS[(k - 1) % len(CLASS_COLOURS)]


def _shortened(name: str, letters: int) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


def score_name(tiles: Sequence[Tile]) -> str:
    """Return what the score on tiles is called."""
    return tiles[0].score_name if tiles else "DSC"


def dsc_text(dsc: float) -> str:
    """Return a DSC as it stands on a tile."""
    return "undefined" if math.isnan(dsc) else f"{dsc:.3f}"
