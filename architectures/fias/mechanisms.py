"""What FIAS is made of: its encoders, their dilations and kernels, weights of fusion, attention, and heads.

The loss over subsets of the heads acts in training alone; what the heads give to a prediction is shown instead, by
leaving out some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.architectures.evaluation.mechanisms import (
    Context,
    Means,
    Mechanism,
    Watch,
    answering,
    attributes,
    cut,
    holding,
    skipped,
    together,
    zeroed,
)
from trifuse.blocks.context_aware_fusion import ContextAwareFusion
from trifuse.blocks.depthwise_multi_kernel import ParallelKernels
from trifuse.blocks.dilated_attention import DilatedAttention
from trifuse.blocks.mixing_attention import MixingAttention
from trifuse.blocks.monte_carlo_attention import MonteCarloAttention

from .dilateformer import REDUCTION, DilateFormerBlock
from .model import Fias

DRAW_SEED = 1
HALF = 0.5
DRAW = "Monte Carlo draw"
_LOGITS = {"channel": "channel_logits", "position": "spatial_logits"}  # the methods that give the fusion's weights
FIXED_WEIGHTS = {which: f"{which} weights of fusion fixed" for which in _LOGITS}


def mechanisms(model: Fias) -> list[Mechanism]:
    """Return the table of a network's mechanisms, from the image to the logits."""
    return [
        *_encoders(model),
        *_dilations(model),
        *_kernels(model),
        *_fusion_weights(model),
        *_attention_blocks(model),
        *_decoder_attention(model),
        *_heads(model),
    ]


def _of_kind(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


# ------------------------------------------------------------------------------------------------- the encoders


def _encoders(model: Fias) -> list[Mechanism]:
    change = "the fusions are given zeros in place of its maps"
    rows = [Mechanism("DilateFormer", change, lambda model, means: zeroed([model.global_encoder]))]
    if model.local_encoder is None:
        return [*rows, Mechanism("convolutional encoder", change, unmeasured="no_dmk: the network has none")]
    return [*rows, Mechanism("convolutional encoder", change, lambda model, means: zeroed([model.local_encoder]))]


def _dilations(model: Fias) -> list[Mechanism]:
    dilations = _of_kind(model, DilatedAttention)[0].dilations  # the same ones in all blocks
    rows = [
        Mechanism(
            f"heads of dilation {dilation}",
            f"the heads that attend at dilation {dilation} give zeros, in every block",
            partial(_without_heads, dilation=dilation),
        )
        for dilation in dict.fromkeys(dilations)
    ]
    if set(dilations) == {1}:
        return rows
    return [*rows, Mechanism("dilation", "all heads attend to their closest neighbours: dilation 1", _undilated)]


def _without_heads(model: Fias, means: Means, dilation: int) -> Context:
    def cuts(block: DilatedAttention) -> Iterator[Context]:
        width = block.proj.in_features // len(block.dilations)
        for group, own in enumerate(block.dilations):
            if own == dilation:
                yield cut([block.proj], slice(group * width, (group + 1) * width), dim=-1)

    return together(each for block in _of_kind(model, DilatedAttention) for each in cuts(block))


def _undilated(model: Fias, means: Means) -> Context:
    blocks = _of_kind(model, DilatedAttention)
    return together(attributes(block, dilations=(1,) * len(block.dilations)) for block in blocks)


def _kernels(model: Fias) -> list[Mechanism]:
    change = "the depthwise kernels of this size give zeros, at every level"
    return [
        Mechanism(name, change, unmeasured="no_dmk: the network has none")
        if model.local_encoder is None
        else Mechanism(name, change, partial(_without_kernels, side=side))
        for side in dict.fromkeys(model.config.dmk_kernels)
        for name in (f"depthwise kernel {side}x{side}",)
    ]


def _without_kernels(model: Fias, means: Means, side: int) -> Context:
    return holding(
        (conv.weight, 0.0)
        for kernels in _of_kind(model, ParallelKernels)
        for conv in kernels.convs
        if conv.kernel_size == (side, side)
    )


# -------------------------------------------------------------------------------------------- the fusion's weights


def _fusion_weights(model: Fias) -> list[Mechanism]:
    rows = []
    for which in _LOGITS:
        half, mean = f"{which} weights of fusion at 1/2", FIXED_WEIGHTS[which]
        changes = ("every weight is 0.5, at every level", "every weight is its mean over images: a fixed mask")
        if not _of_kind(model, ContextAwareFusion):
            reason = f"no context-aware fusion: fusion={model.config.fusion!r}, no_dmk={model.config.no_dmk!r}"
            rows += [
                Mechanism(name, change, unmeasured=reason) for name, change in zip((half, mean), changes, strict=True)
            ]
            continue
        watches = tuple(_watch(which, level) for level in range(len(model.fusions)))
        rows += [
            Mechanism(half, changes[0], partial(_weights_at_half, which=which)),
            Mechanism(mean, changes[1], partial(_weights_at_mean, which=which), watches=watches),
        ]
    return rows


def caf_weights(which: str) -> str:
    """Return how the names of what is watched of a weight, the ``"channel"`` or ``"position"`` one, begin."""
    return f"CAF's {which} weights"


def _watch_name(which: str, level: int) -> str:
    return f"{caf_weights(which)} at 1/{4 * 2**level}"


def _watch(which: str, level: int) -> Watch:
    def record(model: Fias, keep: Callable[[Tensor], object]) -> Context:
        fusion = model.fusions[level]
        compute = getattr(fusion, _LOGITS[which])

        def kept(global_features: Tensor, local_features: Tensor) -> Tensor:
            logits = compute(global_features, local_features)
            keep(torch.sigmoid(logits.float()))
            return logits

        return attributes(fusion, **{_LOGITS[which]: kept})

    return Watch(_watch_name(which, level), record)


def _weights_at_half(model: Fias, means: Means, which: str) -> Context:
    return _weights_at(model, which, [torch.tensor(HALF)] * len(model.fusions))


def _weights_at_mean(model: Fias, means: Means, which: str) -> Context:
    return _weights_at(model, which, [means[_watch_name(which, level)] for level in range(len(model.fusions))])


def _weights_at(model: Fias, which: str, weights: Sequence[Tensor]) -> Context:
    def fixed(fusion: nn.Module, weight: Tensor) -> Context:
        compute, logits = getattr(fusion, _LOGITS[which]), torch.logit(weight.double())

        def constant(global_features: Tensor, local_features: Tensor) -> Tensor:
            asked = compute(global_features, local_features)
            return logits.to(asked).expand_as(asked)

        return attributes(fusion, **{_LOGITS[which]: constant})

    return together(fixed(fusion, weight) for fusion, weight in zip(model.fusions, weights, strict=True))


# ------------------------------------------------------------------------------------------------------ attention


def _attention_blocks(model: Fias) -> list[Mechanism]:
    return [
        Mechanism(
            f"encoder block {stage}.{block}",
            f"block {block} of stage {stage} of the DilateFormer returns what it is given",
            partial(_without_block, stage=stage - 1, block=block - 1),
        )
        for stage, each in enumerate(model.global_encoder.stages, start=1)
        for block in range(1, 1 + len(_of_kind(each, DilateFormerBlock)))
    ]


def _without_block(model: Fias, means: Means, stage: int, block: int) -> Context:
    return skipped([_of_kind(model.global_encoder.stages[stage], DilateFormerBlock)[block]])


def _decoder_attention(model: Fias) -> list[Mechanism]:
    blocks = _of_kind(model.decoder, MixingAttention)
    kinds = {"self-attention": "attn", "Monte Carlo attention": "mca"}
    rows = []
    for name, part in kinds.items():
        change = "it returns what it is given"
        if not blocks:
            rows.append(Mechanism(name, change, unmeasured="mixatt=False: the decoder's blocks do not attend"))
            continue
        rows.append(Mechanism(name, f"{change}, in every block of the decoder", partial(_identity, part=part)))
        rows += [
            Mechanism(
                f"{name} of decoder block {number}",
                f"{change}, in block {number} of the decoder alone, the first being the coarsest",
                partial(_identity, part=part, only=number - 1),
            )
            for number in range(1, 1 + len(blocks))
        ]
    change = "a cell is drawn for each slice, as in training; a prediction takes the mean, and draws nothing"
    if not blocks:
        return [*rows, Mechanism(DRAW, change, unmeasured="mixatt=False: nothing is drawn")]
    return [*rows, Mechanism(DRAW, change, _drawn)]


def _identity(model: Fias, means: Means, part: str, only: int | None = None) -> Context:
    blocks = _of_kind(model.decoder, MixingAttention)
    return skipped([getattr(block, part) for block in (blocks if only is None else blocks[only : only + 1])])


@contextmanager
def _drawn(model: Fias, means: Means) -> Iterator[None]:
    """Let Monte Carlo attention draw as in training, the same draws each time; the rest stays as in evaluation."""
    every_gpu = range(torch.cuda.device_count())
    with torch.random.fork_rng(every_gpu), together(map(_drawing, _of_kind(model.decoder, MonteCarloAttention))):
        torch.manual_seed(DRAW_SEED)
        yield


def _drawing(attention: MonteCarloAttention) -> Context:
    def as_in_training(given: Tensor, result: Tensor) -> Tensor:
        with attributes(attention, training=True, draw="sample"):  # of this module alone; what is in it does not ask
            return attention.forward(given)

    return answering([attention], as_in_training)


# ---------------------------------------------------------------------------------------------------------- heads


def _heads(model: Fias) -> list[Mechanism]:
    """Return a row for each subset of the heads but all of them: what they alone predict."""
    number = len(model.decoder.heads)
    sizes = [f"1/{REDUCTION // 2 ** (head + 1)}" for head in range(number)]
    subsets = [subset for size in range(1, number) for subset in combinations(range(number), size)]
    return [
        Mechanism(
            f"heads {' + '.join(sizes[head] for head in subset)} alone",
            "the other heads' logits are zero; the loss over subsets itself acts in training alone",
            partial(_heads_alone, subset=subset),
        )
        for subset in subsets
    ]


def _heads_alone(model: Fias, means: Means, subset: Sequence[int]) -> Context:
    return zeroed([head for place, head in enumerate(model.decoder.heads) if place not in subset])
