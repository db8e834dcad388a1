"""The learned weights of the encoder's blocks: for the log, and for the reader of a report."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trifuse.architectures.evaluation.charts import BLOCK_COLUMN
from trifuse.architectures.storage.text import listed
from trifuse.blocks.block_selection import heaviest_blocks

from .model import DinoUNet


def block_weights(model: DinoUNet) -> dict[str, float]:
    """Return the softmax weight of every block, by log column; nothing where the blocks are fixed."""
    if not model.config.learned:
        return {}
    return {f"{BLOCK_COLUMN}{index}": weight for index, weight in enumerate(model.fusion.weights.tolist())}


def from_uniform(weights: Tensor) -> float:
    """Return how far weights (N,) lie from 1 / N, at most, as a part of that."""
    return _of_uniform(weights - 1 / len(weights))


def describe_block_weights(model: DinoUNet, start: Mapping[str, float]) -> dict[str, str]:
    """Return the facts of a report on which blocks are selected, and on what training did to their weights.

    Args:
        model: the trained network.
        start: `block_weights` before its first step; empty where that is not known.
    """
    facts = {"Blocks, coarsest stage first": listed(model.fusion.selected)}
    if not model.config.learned:
        return facts
    weights = model.fusion.weights.detach().cpu()
    said = f"within {_percent(from_uniform(weights))} of uniform"
    if not start:
        return {**facts, "Weights of the blocks": f"{said}; those at the start are not known"}
    first = torch.tensor([start[f"{BLOCK_COLUMN}{index}"] for index in range(len(weights))])
    moved = _of_uniform(weights - first)
    before = tuple(heaviest_blocks(first, model.fusion.top_k, model.fusion.order).tolist())
    if model.fusion.top_k == model.fusion.num_blocks:
        chosen = "all blocks are selected"
    elif before != model.fusion.selected:
        chosen = f"selected at the start: {listed(before)}; in this network: {listed(model.fusion.selected)}"
    elif moved < from_uniform(first):
        chosen = "selection unchanged since the start: the seed chose the blocks, see theta_lr_mult"
    else:
        chosen = "selection unchanged since the start"
    return {**facts, "Weights of the blocks": f"{said}, moved by at most {_percent(moved)} of it; {chosen}"}


def _of_uniform(differences: Tensor) -> float:
    return float(differences.abs().max()) * len(differences)


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %"
