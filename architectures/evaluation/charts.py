"""The figures of a training log: losses, scores and learning rate, and the weights of the encoder's blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.storage.best_epoch import BestEpoch
from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.storage.text import count
from trifuse.kernels import DataError

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
    Picture,
    new_figure,
    plain_axes,
    save_picture,
)
from .tables import number

CYCLE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
LINE_STYLES = ("-", "--", "-.", ":")
MARKED_EPOCHS = 40  # curves of up to this many epochs get a marker at each
SCORE_WORDS = ("dice", "dsc", "iou", "precision", "sensitivity")
_SCORE_TITLES = {False: "Validation score", True: "Score on the training cases"}
BLOCK_COLUMN = "weight_block_"


def draw_training_curves(
    log_csv: Path, out: Path, best: BestEpoch | None = None, *, trained_on: bool = False
) -> Picture:
    """Draw losses, validation scores and the learning rate of ``log.csv`` over epochs into ``out/curves.png``.

    Args:
        log_csv: the log.
        out: folder to write into.
        trained_on: whether the scores are those of the training cases, because no case validates.
        best: the epoch to mark; None marks the highest value of the first score.

    Raises:
        DataError: the log is missing, has no rows, or no column to draw.
    """
    log = _columns(log_csv)
    epochs = log.pop("epoch")
    scored = _SCORE_TITLES[trained_on]
    panels = [
        ("Loss", {name: y for name, y in log.items() if "loss" in name}),
        (scored, {name: y for name, y in log.items() if any(word in name for word in SCORE_WORDS)}),
        ("Learning rate", {name: y for name, y in log.items() if name.startswith("lr")}),
    ]
    panels = [(title, curves) for title, curves in panels if curves]
    if not panels:
        raise DataError(log_csv, "columns", got=", ".join(log), want="a loss, a score or a learning rate")

    figure = new_figure(4.2 * len(panels), 3.3)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels, strict=True):
        _draw_curves(axis, title, epochs, curves)
        if title == scored:
            _mark_best(axis, epochs, curves, best)
    alt = f"Training curves over {count(len(epochs), 'epoch')}: " + "; ".join(
        _curve_sentence(title, epochs, name, y) for title, curves in panels for name, y in list(curves.items())[:2]
    )
    header = ["epoch", *(name for _, curves in panels for name in curves)]
    columns = [epochs, *(y for _, curves in panels for y in curves.values())]
    lines = ([number(value) for value in line] for line in zip(*columns, strict=True))
    alt += ". No case validates: the scores are those of the training cases." if trained_on else "."
    return save_picture(figure, out, "curves", "Training curves", alt, header, lines)


def draw_block_weights(
    log_csv: Path, out: Path, *, selected: Sequence[int] = (), start: Mapping[str, float] | None = None
) -> Picture:
    """Draw the softmax weight of every encoder block over epochs into ``out/block_weights.png``.

    Args:
        log_csv: log with columns ``weight_block_0`` to ``weight_block_<N-1>``.
        out: folder to write into.
        selected: the blocks that feed the decoder, first stage first; marked in the picture.
        start: the same columns before training, shown as epoch 0; None where they are not known.

    Raises:
        DataError: the log is missing, has no rows, or no column of block weights.
    """
    log = _columns(log_csv)
    weights = np.array([log[f"{BLOCK_COLUMN}{i}"] for i in range(len(log)) if f"{BLOCK_COLUMN}{i}" in log])
    if not weights.size:
        raise DataError(log_csv, "columns", got=", ".join(log), want=f"{BLOCK_COLUMN}0, {BLOCK_COLUMN}1 ...")
    count, trained, epochs = len(weights), weights.shape[1], log["epoch"]
    if start:
        first = np.array([start[f"{BLOCK_COLUMN}{i}"] for i in range(count)])
        epochs, weights = np.append(0.0, epochs), np.column_stack([first, weights])
    figure = new_figure(9.0, max(2.8, 0.17 * count + 1.2))
    over_time, final = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (1.5, 1)})
    _draw_weight_map(figure, over_time, epochs, weights)
    _draw_final_weights(final, weights[:, -1], selected)
    stages = {block: stage for stage, block in enumerate(selected, start=1)}
    header = ["block", "stage", *(f"epoch_{epoch:g}" for epoch in epochs)]
    lines = ([i, stages.get(i, ""), *(number(w) for w in weights[i])] for i in range(count))
    top = int(weights[:, -1].argmax())
    chosen = f" Blocks {', '.join(map(str, selected))} feed decoder stages 1 to {len(selected)}." if selected else ""
    alt = (
        f"Weights of {count} encoder blocks over {trained} epochs; after the last, block {top} weighs most, "
        f"{weights[top, -1]:.4f} against {1 / count:.4f} for equal weights.{chosen}"
    )
    return save_picture(figure, out, "block_weights", "Weights of the encoder blocks", alt, header, lines)


def _draw_curves(axis: Any, title: str, epochs: NDArray, curves: dict[str, NDArray]) -> None:
    _dress(axis, title, "Epoch")
    marker = "o" if len(epochs) <= MARKED_EPOCHS else None
    for i, (name, y) in enumerate(curves.items()):
        colour, style = CYCLE[i % len(CYCLE)], LINE_STYLES[i // len(CYCLE) % len(LINE_STYLES)]
        axis.plot(epochs, y, color=colour, ls=style, lw=1.6, marker=marker, ms=2.5, label=_words(name))
    if title == "Loss" and all((y[np.isfinite(y)] > 0).all() for y in curves.values()):
        _use_log_scale(axis)
    if title != "Learning rate" or len(curves) > 1:
        axis.legend(fontsize=SMALL, frameon=False, labelcolor=INK)


def _mark_best(axis: Any, epochs: NDArray, curves: dict[str, NDArray], best: BestEpoch | None) -> None:
    """Ring the best epoch on the curve of the score that chose it, and name it below the axis."""
    axis.set_ylim(-0.02, 1.02)
    name = best.column if best is not None and best.column in curves else next(iter(curves))
    y = curves[name]
    if not np.isfinite(y).any():
        return
    at = int(np.nanargmax(y)) if best is None else int(np.searchsorted(epochs, best.epoch))
    word = "last" if best is not None and best.column is None else "best"
    axis.plot(epochs[at], y[at], "o", ms=8, mfc="none", mec=VERMILION, mew=1.6, zorder=4)
    axis.set_xlabel(f"Epoch ({word}: {epochs[at]:g}, {_words(name)} {y[at]:.3f})", fontsize=NORMAL, color=INK)


def _use_log_scale(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


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
    plain_axes(axis)
    if x_label == "Epoch":
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _columns(log_csv: Path) -> dict[str, NDArray]:
    rows = read_log(log_csv)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _curve_sentence(title: str, epochs: NDArray, name: str, y: NDArray) -> str:
    seen = np.flatnonzero(np.isfinite(y))
    if not seen.size:
        return f"{_words(name)} has no values"
    if title in _SCORE_TITLES.values():
        best = int(np.nanargmax(y))
        return f"{_words(name)} is best, {y[best]:.3f}, at epoch {epochs[best]:g}"
    return f"{_words(name)} goes from {y[seen[0]]:.3g} to {y[seen[-1]]:.3g}"


def _words(name: str) -> str:
    return name.replace("_", " ")
