"""The pictures of a run: training curves, an overlay sheet, the weights of the blocks.

Each picture is a PNG, a CSV of the numbers in it, and a sentence for people who cannot see it. Colours are told apart
by people with any colour vision, and line styles or words say the same again. matplotlib is loaded when the first
picture is drawn, through its object interface: no window, no global figure, no style left behind.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.files import atomic_write
from trifuse.kernels import DataError, MissingExtra

from .metrics import case_metrics
from .tables import EXTRA, Row, mean_of_defined, number, prediction_path, write_csv

if TYPE_CHECKING:
    from trifuse.architectures.data.cases import Study

# Okabe and Ito (2008), "Color universal design"
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
CLASS_COLOURS = (SKY, ORANGE, YELLOW, PURPLE, GREEN, VERMILION, BLUE)
CYCLE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
LINE_STYLES = ("-", "--", "-.", ":")
INK, FAINT, GRID = "#222222", "#6B6B6B", "#E3E3E3"

PLATE = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "boxstyle": "round,pad=0.3"}

DPI = 150
SMALL, NORMAL, LARGE = 8, 9, 11  # points
LONGEST_NAME = 60  # letters of a case's name that fit above its row
MARKED_EPOCHS = 40  # curves of up to this many epochs get a marker at each
SCORE_WORDS = ("dice", "dsc", "iou", "precision", "sensitivity")
BLOCK_COLUMN = "weight_block_"


@dataclass(frozen=True)
class Picture:
    """A picture on disk, the numbers in it, and the sentence that says what it shows."""

    title: str
    png: Path
    csv: Path
    alt: str


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


def draw_training_curves(log_csv: Path, out: Path) -> Picture:
    """Draw losses, validation scores and the learning rate of ``log.csv`` over epochs into ``out/curves.png``.

    Raises:
        DataError: the log is missing, has no rows, or no column to draw.
    """
    log = _read_log(log_csv)
    epochs = log.pop("epoch")
    panels = [
        ("Loss", {name: y for name, y in log.items() if "loss" in name}),
        ("Validation score", {name: y for name, y in log.items() if any(word in name for word in SCORE_WORDS)}),
        ("Learning rate", {name: y for name, y in log.items() if name.startswith("lr")}),
    ]
    panels = [(title, curves) for title, curves in panels if curves]
    if not panels:
        raise DataError(log_csv, "columns", got=", ".join(log), want="a loss, a score or a learning rate")

    figure = _new_figure(4.2 * len(panels), 3.3)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels, strict=True):
        _draw_curves(axis, title, epochs, curves)
    alt = f"Training curves over {len(epochs)} epochs: " + "; ".join(
        _curve_sentence(title, epochs, name, y) for title, curves in panels for name, y in list(curves.items())[:2]
    )
    header = ["epoch", *(name for _, curves in panels for name in curves)]
    columns = [epochs, *(y for _, curves in panels for y in curves.values())]
    lines = ([number(value) for value in line] for line in zip(*columns, strict=True))
    return _save(figure, out, "curves", "Training curves", alt + ".", header, lines)


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
    figure = _new_figure(3 * width + 0.2, sum(width * aspect + 0.26 for aspect in aspects) + 0.75)
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
    return _save(figure, out, "overlays", title, alt, header, lines)


def draw_block_weights(log_csv: Path, out: Path, *, selected: Sequence[int] = ()) -> Picture:
    """Draw the softmax weight of every encoder block over epochs into ``out/block_weights.png``.

    Args:
        log_csv: log with columns ``weight_block_0`` to ``weight_block_<N-1>``.
        out: folder to write into.
        selected: the blocks that feed the decoder, first stage first; marked in the picture.

    Raises:
        DataError: the log is missing, has no rows, or no column of block weights.
    """
    log = _read_log(log_csv)
    weights = np.array([log[f"{BLOCK_COLUMN}{i}"] for i in range(len(log)) if f"{BLOCK_COLUMN}{i}" in log])
    if not weights.size:
        raise DataError(log_csv, "columns", got=", ".join(log), want=f"{BLOCK_COLUMN}0, {BLOCK_COLUMN}1 ...")
    count = len(weights)
    figure = _new_figure(9.0, max(2.8, 0.17 * count + 1.2))
    over_time, final = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (1.5, 1)})
    _draw_weight_map(figure, over_time, log["epoch"], weights)
    _draw_final_weights(final, weights[:, -1], selected)
    stages = {block: stage for stage, block in enumerate(selected, start=1)}
    header = ["block", "stage", *(f"epoch_{epoch:g}" for epoch in log["epoch"])]
    lines = ([i, stages.get(i, ""), *(number(w) for w in weights[i])] for i in range(count))
    top = int(weights[:, -1].argmax())
    chosen = f" Blocks {', '.join(map(str, selected))} feed decoder stages 1 to {len(selected)}." if selected else ""
    alt = (
        f"Weights of {count} encoder blocks over {weights.shape[1]} epochs; after the last, block {top} weighs most, "
        f"{weights[top, -1]:.4f} against {1 / count:.4f} for equal weights.{chosen}"
    )
    return _save(figure, out, "block_weights", "Weights of the encoder blocks", alt, header, lines)


# Drawing ------------------------------------------------------------------------------------------------------------


def _draw_curves(axis: Any, title: str, epochs: NDArray, curves: dict[str, NDArray]) -> None:
    _dress(axis, title, "Epoch")
    marker = "o" if len(epochs) <= MARKED_EPOCHS else None
    for i, (name, y) in enumerate(curves.items()):
        colour, style = CYCLE[i % len(CYCLE)], LINE_STYLES[i // len(CYCLE) % len(LINE_STYLES)]
        axis.plot(epochs, y, color=colour, ls=style, lw=1.6, marker=marker, ms=2.5, label=_words(name))
    if title == "Validation score":
        name, y = next(iter(curves.items()))
        if np.isfinite(y).any():
            best = int(np.nanargmax(y))
            axis.plot(epochs[best], y[best], "o", ms=8, mfc="none", mec=VERMILION, mew=1.6, zorder=4)
            label = f"best {_words(name)} {y[best]:.3f}, epoch {epochs[best]:g}"
            axis.set_xlabel(f"Epoch ({label})", fontsize=NORMAL, color=INK)
        axis.set_ylim(-0.02, 1.02)
    if title == "Loss" and all((y[np.isfinite(y)] > 0).all() for y in curves.values()):
        _use_log_scale(axis)
    if title != "Learning rate" or len(curves) > 1:
        axis.legend(fontsize=SMALL, frameon=False, labelcolor=INK)


def _use_log_scale(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


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


def _draw_weight_map(figure: Any, axis: Any, epochs: NDArray, weights: NDArray) -> None:
    ratio = weights * len(weights)  # 1 where all blocks weigh the same
    reach = max(float(np.abs(ratio - 1).max()), 1e-3)
    half = (epochs[-1] - epochs[0]) / max(1, len(epochs) - 1) / 2 or 0.5
    image = axis.imshow(
        ratio,
        cmap="PuOr_r",
        vmin=1 - reach,
        vmax=1 + reach,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(epochs[0] - half, epochs[-1] + half, -0.5, len(weights) - 0.5),
    )
    _dress(axis, "Over training", "Epoch")
    axis.grid(False)
    axis.set_ylabel("Encoder block (0 = first)", fontsize=NORMAL, color=INK)
    bar = figure.colorbar(image, ax=axis, pad=0.02, fraction=0.05)
    bar.set_label("weight / equal weight", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=INK)
    bar.outline.set_visible(False)


def _draw_final_weights(axis: Any, weights: NDArray, selected: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = [VERMILION if i in selected else "#9DB7C9" for i in range(len(weights))]
    axis.barh(np.arange(len(weights)), weights, color=colours, height=0.75)
    _dress(axis, "After the last epoch", "Softmax weight")
    axis.axvline(1 / len(weights), color=INK, lw=1, ls="--")
    axis.set_xlim(0, float(weights.max()) * 1.05)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    beside = {"transform": axis.get_yaxis_transform(), "va": "center"}
    for stage, block in enumerate(selected, start=1):
        axis.text(1.02, block, f"stage {stage}", fontsize=SMALL, color=VERMILION, **beside)
    above = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    axis.text(1 / len(weights), 1.0, "equal", fontsize=SMALL, color=FAINT, **above)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    axis.tick_params(axis="y", labelleft=False, length=0)
    axis.grid(False, axis="y")


def _dress(axis: Any, title: str, x_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=LARGE, color=INK, loc="left", weight="bold", pad=12)
    axis.set_xlabel(x_label, fontsize=NORMAL, color=INK)
    axis.tick_params(labelsize=SMALL, colors=INK)
    axis.grid(True, color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    if x_label == "Epoch":
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _new_figure(width_in: float, height_in: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "med", "drawing a figure") from None
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, out: Path, name: str, title: str, alt: str, header: Sequence[str], lines: Any) -> Picture:
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    picture = Picture(title, out / f"{name}.png", out / f"{name}.csv", alt)
    write_csv(picture.csv, header, lines)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Title": title, "Description": alt})
    with atomic_write(picture.png) as stream:
        stream.write(drawn.getvalue())
    return picture


# What to draw -------------------------------------------------------------------------------------------------------


def _read_log(path: Path) -> dict[str, NDArray]:
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            lines = list(csv.DictReader(stream))
    except OSError as error:
        raise DataError(path, "log", got=error.strerror, want="the CSV log of a training run") from None
    if not lines or "epoch" not in lines[0]:
        got = "no rows" if not lines else f"columns {', '.join(map(str, lines[0]))}"
        raise DataError(path, "log", got=got, want="a column called epoch and at least one row")
    return {name: np.array([_value(line.get(name)) for line in lines]) for name in lines[0] if name}


def _value(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return math.nan


def _choose_cases(rows: Sequence[Row], limit: int) -> list[tuple[str, float, str]]:
    """Return (case, mean DSC, worst / median / best), the worst first."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row.status != EXTRA:
            scores.setdefault(row.case_id, []).append(row.scores["dsc"])
    means = {case_id: mean_of_defined(values) for case_id, values in scores.items()}
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


def _curve_sentence(title: str, epochs: NDArray, name: str, y: NDArray) -> str:
    seen = np.flatnonzero(np.isfinite(y))
    if not seen.size:
        return f"{_words(name)} has no values"
    if title == "Validation score":
        best = int(np.nanargmax(y))
        return f"{_words(name)} is best, {y[best]:.3f}, at epoch {epochs[best]:g}"
    return f"{_words(name)} goes from {y[seen[0]]:.3g} to {y[seen[-1]]:.3g}"


def _class_colour(k: int) -> str:
    return CLASS_COLOURS[(k - 1) % len(CLASS_COLOURS)]


def _dsc_text(dsc: float) -> str:
    return "undefined" if math.isnan(dsc) else f"{dsc:.3f}"


def _words(name: str) -> str:
    return name.replace("_", " ")
