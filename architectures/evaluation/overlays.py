"""The overlay sheet: slices of the best and the worst cases, image beside truth beside prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trifuse.kernels import DataError

from .metrics import case_metrics
from .picture import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    LARGE,
    NORMAL,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILION,
    YELLOW,
    Picture,
    new_figure,
    save_picture,
)
from .scoring import EXTRA, Row, prediction_path
from .summary import case_means
from .tables import number

if TYPE_CHECKING:
    from trifuse.architectures.data.cases import Study

CLASS_COLOURS = (SKY, ORANGE, YELLOW, PURPLE, GREEN, VERMILION, BLUE)
PLATE = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "boxstyle": "round,pad=0.3"}
LONGEST_NAME = 60  # letters of a case's name that fit above its row


@dataclass(frozen=True, eq=False)
class Tile:
    """One slice of one case: image, truth and prediction of shape (H, W), class ids; None for no prediction."""

    case_id: str
    note: str
    slice: int
    depth: int
    image: NDArray
    truth: NDArray
    prediction: NDArray | None
    spacing_mm: tuple[float, float]
    dsc: float


def collect_tiles(
    pred_dir: Path,
    study: Study,
    rows: Sequence[Row],
    *,
    limit: int = 6,
    slice_index: int | None = None,
) -> list[Tile]:
    """Choose cases of a case table and cut one slice out of each, the worst case first.

    All cases when there are at most ``limit``; otherwise that many, evenly spaced by rank, the best and the worst
    among them. The slice is the one with the largest true area, or ``slice_index`` counted from 0.
    """
    from trifuse.architectures.data.cases import load_case
    from trifuse.architectures.data.nifti import read_labels

    cases = {case.case_id: case for case in study.cases}
    tiles = []
    for case_id, dsc, note in _choose_cases(rows, limit):
        image, truth = load_case(study, cases[case_id])
        assert truth is not None  # a case without a label has no row
        depth = len(truth.voxels)
        index = int((truth.voxels != 0).sum((1, 2)).argmax()) if slice_index is None else min(slice_index, depth - 1)
        try:
            prediction = read_labels(prediction_path(pred_dir, case_id), like=truth).voxels[index]
        except DataError:
            prediction = None
        slice_of = image.voxels[index], truth.voxels[index], prediction
        tiles.append(Tile(case_id, note, index, depth, *slice_of, truth.spacing_mm[1:], dsc))
    return tiles


def draw_overlays(
    tiles: Sequence[Tile], class_names: Sequence[str], out: Path, *, title: str = "Predictions beside the truth"
) -> Picture:
    """Draw one row per case (image, truth, prediction with the DSC on it) into ``out/overlays.png``.

    Args:
        tiles: what to show, e.g. from `collect_tiles`.
        class_names: names of the class ids, the background first.
        out: folder to write into.
        title: of the picture.
    """
    windows = [_window(tile) for tile in tiles]
    aspects = [_aspect(tile, window) for tile, window in zip(tiles, windows, strict=True)]
    width = 2.6
    figure = new_figure(3 * width + 0.2, sum(width * aspect + 0.26 for aspect in aspects) + 0.75)
    axes = figure.subplots(len(tiles), 3, squeeze=False, gridspec_kw={"height_ratios": aspects})
    for line, tile, window in zip(axes, tiles, windows, strict=True):
        _draw_tile_row(line, tile, window)
    heading = {"ha": "center", "va": "bottom", "fontsize": LARGE, "color": INK, "weight": "bold"}
    for axis, content in zip(axes[0], ("Image", "Truth", "Prediction"), strict=True):
        axis.annotate(
            content, (0.5, 1), xytext=(0, 19), xycoords="axes fraction", textcoords="offset points", **heading
        )
    _draw_legend(figure, tiles, class_names)
    header = ["case_id", "slice", "pixels_truth", "pixels_prediction", "dsc_slice", "dsc_case"]
    lines = [_tile_numbers(tile) for tile in tiles]
    cases = ", ".join(f"{tile.case_id} {_dsc_text(tile.dsc)}" for tile in tiles)
    alt = f"Overlay sheet of {len(tiles)} cases, image, truth and prediction side by side; DSC of each case: {cases}."
    return save_picture(figure, out, "overlays", title, alt, header, lines)


def _draw_tile_row(line: Sequence[Any], tile: Tile, window: tuple[slice, slice]) -> None:
    image = tile.image[window]
    low, high = np.percentile(image, (1, 99.5))
    row_mm, column_mm = tile.spacing_mm
    for axis in line:
        axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=row_mm / column_mm)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    _draw_scale_bar(line[0], image.shape, column_mm)
    name = tile.case_id if len(tile.case_id) <= LONGEST_NAME else tile.case_id[: LONGEST_NAME - 1] + "…"
    label = f"{name}, slice {tile.slice + 1} of {tile.depth}" + (f" ({tile.note})" if tile.note else "")
    line[0].set_title(label, fontsize=SMALL, color=FAINT, loc="left", pad=3, parse_math=False)
    truth = tile.truth[window]
    _draw_masks(line[1], truth)
    if tile.prediction is None:
        middle = {"transform": line[2].transAxes, "ha": "center", "va": "center"}
        line[2].text(0.5, 0.5, "no prediction", color="white", fontsize=NORMAL, bbox=PLATE, **middle)
    else:
        _draw_masks(line[2], tile.prediction[window])
        _draw_contour(line[2], truth != 0, "white", 1.0, "dashed")
    corner = {"transform": line[2].transAxes, "va": "top", "weight": "bold"}
    line[2].text(0.04, 0.96, f"DSC {_dsc_text(tile.dsc)}", color="white", fontsize=NORMAL, bbox=PLATE, **corner)


def _draw_legend(figure: Any, tiles: Sequence[Tile], class_names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    drawn = [np.unique(labels) for tile in tiles for labels in (tile.truth, tile.prediction) if labels is not None]
    shown = sorted(set(np.concatenate(drawn).tolist()) & set(range(1, len(class_names)))) or [1]
    handles = [Line2D([], [], color=_class_colour(k), lw=2, label=class_names[k]) for k in shown]
    handles.append(Line2D([], [], color="white", lw=1.2, ls="--", label="true outline, on the prediction"))
    look = {"fontsize": SMALL, "facecolor": "#4A4A4A", "labelcolor": "white", "edgecolor": "none"}
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), **look)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_masks(axis: Any, labels: NDArray) -> None:
    from matplotlib.colors import to_rgb

    for k in (int(value) for value in np.unique(labels) if value):
        tint = np.zeros((*labels.shape, 4))
        tint[labels == k] = (*to_rgb(_class_colour(k)), 0.35)
        axis.imshow(tint, aspect=axis.get_aspect(), interpolation="nearest")
        _draw_contour(axis, labels == k, _class_colour(k), 1.5, "solid")


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


def _draw_scale_bar(axis: Any, shape: Sequence[int], column_mm: float) -> None:
    from matplotlib import patheffects

    height, width = shape
    length_mm = next((mm for mm in (100, 50, 20, 10, 5) if mm / column_mm <= width / 2.5), 1)
    start, y = 0.06 * width, 0.93 * height
    dark_rim = [patheffects.withStroke(linewidth=4, foreground="black", alpha=0.6)]
    bar = axis.plot([start, start + length_mm / column_mm], [y, y], color="white", lw=2, solid_capstyle="butt")[0]
    text = axis.text(start, y - 0.025 * height, f"{length_mm} mm", color="white", fontsize=SMALL, va="bottom")
    bar.set_path_effects(dark_rim)
    text.set_path_effects(dark_rim)


def _choose_cases(rows: Sequence[Row], limit: int) -> list[tuple[str, float, str]]:
    """Return (case, mean DSC, worst / median / best), the worst first."""
    means = case_means([row for row in rows if row.status != EXTRA], "dsc")
    ranked = sorted(means, key=lambda case_id: (math.inf if math.isnan(means[case_id]) else means[case_id], case_id))
    places = range(len(ranked)) if len(ranked) <= limit else np.linspace(0, len(ranked) - 1, limit).round().astype(int)
    notes = {0: "worst", len(ranked) - 1: "best"} if len(ranked) > 2 else {}
    if len(ranked) % 2 and len(ranked) > 2:
        notes[len(ranked) // 2] = "median"
    return [(ranked[i], means[ranked[i]], notes.get(int(i), "")) for i in places]


def _window(tile: Tile) -> tuple[slice, slice]:
    """Return a square (in mm) around everything labelled, with a margin; the whole slice if there is nothing."""
    labelled = tile.truth != 0
    if tile.prediction is not None:
        labelled = labelled | (tile.prediction != 0)
    if not labelled.any():
        return slice(None), slice(None)
    spans = [np.flatnonzero(labelled.any(axis=other)) for other in (1, 0)]
    field_mm = [n * mm for n, mm in zip(labelled.shape, tile.spacing_mm, strict=True)]
    largest = max((span[-1] - span[0] + 1) * mm for span, mm in zip(spans, tile.spacing_mm, strict=True))
    side_mm = max(1.8 * largest, 0.4 * max(field_mm))
    window = []
    for span, mm, n in zip(spans, tile.spacing_mm, labelled.shape, strict=True):
        length = min(n, math.ceil(side_mm / mm))
        start = min(max(0, round((span[0] + span[-1] + 1 - length) / 2)), n - length)
        window.append(slice(start, start + length))
    return window[0], window[1]


def _aspect(tile: Tile, window: tuple[slice, slice]) -> float:
    height, width = tile.image[window].shape
    return height * tile.spacing_mm[0] / (width * tile.spacing_mm[1])


def _tile_numbers(tile: Tile) -> list[object]:
    prediction = np.zeros_like(tile.truth) if tile.prediction is None else tile.prediction
    slice_dsc = case_metrics(prediction, tile.truth, None)["dsc"]
    areas = int((tile.truth != 0).sum()), int((prediction != 0).sum())
    return [tile.case_id, tile.slice, *areas, number(slice_dsc), number(tile.dsc)]


def _class_colour(k: int) -> str:
    return CLASS_COLOURS[(k - 1) % len(CLASS_COLOURS)]


def _dsc_text(dsc: float) -> str:
    return "undefined" if math.isnan(dsc) else f"{dsc:.3f}"
