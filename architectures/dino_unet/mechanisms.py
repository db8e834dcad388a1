"""What DINO-UNet is made of: weights of its blocks, their selection, the fused map, the image branch, and the skips."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trifuse.architectures.evaluation.mechanisms import Context, Means, Mechanism, holding, zeroed
from trifuse.architectures.storage.text import listed

from .block_weights import from_uniform
from .model import DinoUNet


def mechanisms(model: DinoUNet) -> list[Mechanism]:
    """Return the table of a network's mechanisms, in the order of its decoder."""
    return [_weights(model), _selection(model), *_bottleneck(model), _image(model), *_skips(model)]


def other_blocks(model: DinoUNet) -> Tensor:
    """Return a selection of as many blocks with as few of the selected ones as there can be, int64 of shape (k,).

    The lightest blocks, ordered as the selected ones are; of selected blocks those that are left.
    """
    fusion = model.fusion
    selected, weights = set(fusion.selected), fusion.weights.tolist()
    rank = sorted(range(fusion.num_blocks), key=lambda block: (block in selected, weights[block]))
    others = rank[: fusion.top_k]
    return torch.tensor(sorted(others, reverse=True) if fusion.order == "depth" else others[::-1])


def _weights(model: DinoUNet) -> Mechanism:
    name = "learned weights of blocks"
    if not model.config.learned:
        return Mechanism(name, "uniform weights", unmeasured="the blocks are fixed and have no weights")
    away = from_uniform(model.fusion.weights.detach())
    change = f"theta is set to zero: uniform weights, the same blocks; learned ones lie within {away:.1%} of uniform"
    return Mechanism(name, change.replace("%", " %"), _uniform)


def _uniform(model: DinoUNet, means: Means) -> Context:
    fusion = model.fusion
    assert fusion.logits is not None  # there are weights
    return holding([(fusion.frozen_selection, fusion.selection), (fusion.logits, 0.0)])


def _selection(model: DinoUNet) -> Mechanism:
    name = "selection of blocks"
    fusion = model.fusion
    if not model.config.learned:
        return Mechanism(name, "other blocks", unmeasured="the blocks are fixed, none is selected")
    if fusion.top_k == fusion.num_blocks:
        reason = f"all {fusion.num_blocks} blocks are selected: there is nothing to select"
        return Mechanism(name, "other blocks", unmeasured=reason)
    chosen, others = listed(fusion.selected), listed(other_blocks(model).tolist())
    change = f"the decoder's skips come from blocks {others} in place of {chosen}, counted from 0"
    return Mechanism(name, change, lambda model, means: holding([(model.fusion.frozen_selection, other_blocks(model))]))


def _bottleneck(model: DinoUNet) -> list[Mechanism]:
    parts = {"proj_fused": "fused map", "proj_last": "last block's map"}
    change = "the bottleneck is made without it"
    return [
        Mechanism(name, change, unmeasured=f"bottleneck={model.config.effective_bottleneck!r} does without it")
        if projection is None
        else Mechanism(name, change, partial(_without_projection, part=part))
        for part, name in parts.items()
        for projection in (getattr(model.decoder, part),)
    ]


def _without_projection(model: DinoUNet, means: Means, part: str) -> Context:
    return holding([(getattr(model.decoder, part).weight, 0.0)])  # streaming uses the weight, and not the layer


def _image(model: DinoUNet) -> Mechanism:
    name, change = "image branch", "every stage of the decoder is given zeros in place of the image"
    if not model.config.spatial_integration:
        return Mechanism(name, change, unmeasured="spatial_integration=False: the decoder does not see the image")
    return Mechanism(name, change, lambda model, means: zeroed(model.decoder.images))


def _skips(model: DinoUNet) -> list[Mechanism]:
    return [
        Mechanism(
            f"skip of stage {stage}",
            f"stage {stage} of the decoder, the first being the coarsest, is given zeros in place of block {block}",
            partial(_without_skip, stage=stage - 1),
        )
        for stage, block in enumerate(model.fusion.selected, start=1)
    ]


def _without_skip(model: DinoUNet, means: Means, stage: int) -> Context:
    return zeroed([model.decoder.skips[stage]])
