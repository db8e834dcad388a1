"""Every block, as small as it can be made, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trifuse import blocks
from trifuse.blocks.ecg_attention import EcgDualAttention
from trifuse.blocks.normalization import BatchNormOfPresent, RunningNorm


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def maps(channels: int, side: int = 6) -> Callable[[int], tuple[Any, ...]]:
    return lambda samples: (drawn(samples, channels, side, side),)


def pyramid(samples: int) -> tuple[Any, ...]:
    return ([drawn(samples, dim, side, side) for dim, side in ((4, 8), (6, 4))],)


def film(samples: int) -> tuple[Any, ...]:
    return drawn(samples, 4, 5, 3), drawn(samples, 4), drawn(samples, 2), drawn(samples).abs() * 40


def with_some_ecgs(samples: int) -> tuple[Any, ...]:
    present = torch.arange(samples) % 2 == 0
    segments = (torch.arange(samples * 15) % 18).view(samples, 5, 3).to(torch.uint8)
    return drawn(samples, 4, 5, 3), drawn(samples, 3), drawn(samples).abs() * 40, present, segments


@dataclass(frozen=True)
class Tiny:
    """How to make a block, and what it is called with for a number of samples."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    fused: bool = False  # whether it runs a Triton kernel


BLOCKS = {
    "BatchNormOfPresent": Tiny(lambda: BatchNormOfPresent(4), lambda n: (drawn(n, 4, 3, 2), torch.arange(n) > 0)),
    "ContextAwareFusion": Tiny(lambda: blocks.ContextAwareFusion(4), lambda n: maps(4)(n) + maps(4)(n), fused=True),
    "ConvNormReLU": Tiny(lambda: blocks.ConvNormReLU(3, 4), maps(3)),
    "DepthwiseMultiKernel": Tiny(lambda: blocks.DepthwiseMultiKernel(3, 4), maps(3, 8), fused=True),
    "DilatedAttention": Tiny(
        lambda: blocks.DilatedAttention(4, 2, dilations=(1, 2)), lambda n: (drawn(n, 5, 4, 4),), fused=True
    ),
    "EcgDualAttention": Tiny(lambda: EcgDualAttention(8, 3, leads=2), lambda n: (drawn(n, 8, 2, 3),)),
    "ImageBranch": Tiny(lambda: blocks.ImageBranch(4), lambda n: (*maps(3)(n), (9, 9))),
    "LayerScale": Tiny(lambda: blocks.LayerScale(6), lambda n: (drawn(n, 5, 6), drawn(n, 5, 6))),
    "MemoryEfficientAttention": Tiny(lambda: blocks.MemoryEfficientAttention(8, 2), lambda n: (drawn(n, 5, 8),)),
    "MixingAttention": Tiny(
        lambda: blocks.MixingAttention(8, 2, in_dim=4), lambda n: (drawn(n, 4, 3, 3), drawn(n, 8, 6, 6))
    ),
    "Mlp": Tiny(lambda: blocks.Mlp(6, 8), lambda n: (drawn(n, 5, 6),)),
    "MonteCarloAttention": Tiny(lambda: blocks.MonteCarloAttention(4), maps(4), fused=True),
    "MonteCarloAttention by sample": Tiny(lambda: blocks.MonteCarloAttention(4, draw="sample"), maps(4), fused=True),
    "PlainUNetDecoder": Tiny(lambda: blocks.PlainUNetDecoder((4, 6), 3), pyramid),
    "PlainUNetEncoder": Tiny(lambda: blocks.PlainUNetEncoder(1, (4, 6)), maps(1, 8)),
    "RunningNorm": Tiny(lambda: RunningNorm(4), lambda n: (drawn(n, 4),)),
    "SwiGLU": Tiny(lambda: blocks.SwiGLU(6, 8), lambda n: (drawn(n, 5, 6),)),
    "TemporalAwareFusion": Tiny(lambda: blocks.TemporalAwareFusion(4, ecg_dim=3), with_some_ecgs, fused=True),
    "TemporalAwareFusion by one value": Tiny(
        lambda: blocks.TemporalAwareFusion(4, ecg_dim=3, projection="broadcast", rectify=True),
        with_some_ecgs,
        fused=True,
    ),
    "TemporalFiLMGate": Tiny(lambda: blocks.TemporalFiLMGate(4), film, fused=True),
    "TransformerBlock": Tiny(lambda: blocks.TransformerBlock(8, 2), lambda n: (drawn(n, 5, 8),), fused=True),
    "UNetDecoderStage": Tiny(
        lambda: blocks.UNetDecoderStage(4, 3, side_dims=[2]), lambda n: (drawn(n, 4, 3, 3), [drawn(n, 2, 6, 6)])
    ),
    "WeightedBlockFusion": Tiny(
        lambda: blocks.WeightedBlockFusion(3, 1), lambda n: ([drawn(n, 5, 4) + i for i in range(3)],), fused=True
    ),
}
"""The blocks by name; those that are not exported are here because a network uses them by themselves."""


def in_float64(given: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, given)
