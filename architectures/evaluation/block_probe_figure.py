"""The picture of a probe: the weight of every block, what explaining loses without it, and what k blocks explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.architectures.storage.text import listed

from .block_probe import BestBlocks
from .picture import (
    BLUE,
    FAINT,
    INK,
    LARGE,
    NORMAL,
    ORANGE,
    VERMILION,
    Picture,
    new_figure,
    plain_axes,
    save_picture,
)
from .statistics import mean_interval
from .tables import number

NAME = "block_probe"


@dataclass(frozen=True)
class BlockProbe:
    """What was found of each block.

    Attributes:
        weights: learned weights, (seeds, N).
        alone: share of the variance that each block explains alone, (N,).
        without: what all blocks but one explain, (N,).
        best: the best blocks of each number from 1 to N.
    """

    weights: np.ndarray
    alone: Sequence[float]
    without: Sequence[float]
    best: Sequence[BestBlocks]

    @property
    def lost(self) -> list[float]:
        """What explaining loses without each block."""
        return [self.best[-1].explained - one for one in self.without]


def draw_block_probe(probe: BlockProbe, out: Path, backbone: str, cohort: str) -> Picture:
    """Draw ``out/block_probe.png`` and write its numbers to ``out/block_probe.csv``, a row for each block and each k.

    Raises:
        MissingExtra: scipy or matplotlib is not installed.
    """
    seeds, blocks = probe.weights.shape
    means = probe.weights.mean(axis=0)
    intervals = np.array([mean_interval(column) for column in probe.weights.T])
    figure = new_figure(11.0, 3.4)
    weighed, left_out, curve = figure.subplots(1, 3)
    at = np.arange(blocks)
    reach = np.nan_to_num(np.abs(intervals.T - means))
    weighed.bar(at, means, color=BLUE, yerr=reach, ecolor=INK, capsize=2)
    weighed.axhline(1 / blocks, color=FAINT, lw=1, ls="--")
    left_out.bar(at, probe.lost, color=ORANGE)
    curve.plot(at + 1, [best.explained for best in probe.best], "o-", color=VERMILION, ms=3)
    _dress(weighed, f"Learned weight, {seeds} seeds", "Encoder block (0 = first)", "softmax weight")
    _dress(left_out, "Lost without it", "Encoder block (0 = first)", "share of the variance")
    _dress(curve, "Explained by the best k", "Number of blocks k", "share of the variance")
    header = ["block", "weight", "weight_low", "weight_high", "explained_alone", "lost_without"]
    header += ["k", "explained_by_best_k", "best_k_blocks", "all_subsets_tried"]
    lines = (
        [
            *(block, number(means[block]), *map(number, intervals[block]), number(probe.alone[block])),
            *(number(probe.lost[block]), block + 1, number(best.explained), " ".join(map(str, best.blocks))),
            "yes" if best.exhaustive else "no",
        ]
        for block, best in enumerate(probe.best)
    )
    return save_picture(figure, out, NAME, f"Blocks of {backbone} on {cohort}", in_words(probe), header, lines)


def in_words(probe: BlockProbe) -> str:
    """Say what a probe found in a sentence."""
    weights, lost = probe.weights.mean(axis=0), probe.lost
    heaviest, missed = int(weights.argmax()), int(np.argmax(lost))
    few = next(best for best in probe.best if best.explained >= 0.95 * probe.best[-1].explained)
    return (
        f"Of {len(weights)} blocks, block {heaviest} weighs most, {weights[heaviest]:.3f} against "
        f"{1 / len(weights):.3f} for equal weights; without block {missed} most is lost, {lost[missed]:.3f} of the "
        f"variance, of which all blocks explain {probe.best[-1].explained:.3f} and blocks {listed(few.blocks)} "
        f"{few.explained:.3f}; alone block {int(np.argmax(probe.alone))} explains most, {max(probe.alone):.3f}."
    )


def _dress(axis: Any, title: str, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=LARGE, color=INK, loc="left", weight="bold")
    axis.set_xlabel(x_label, fontsize=NORMAL, color=INK)
    axis.set_ylabel(y_label, fontsize=NORMAL, color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    plain_axes(axis, grid=None)
