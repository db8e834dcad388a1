"""Every block under a compiler: one graph for every batch size, forward and backward, on both paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiling import assert_compiles
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trifuse import blocks
from trifuse.blocks.ecg_attention import EcgDualAttention
from trifuse.blocks.normalization import BatchNormOfPresent, RunningNorm
from trifuse.kernels import backend


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
class Block:
    """How to make a block, and what it is called with for a number of samples."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    fused: bool = False  # whether it runs a Triton kernel


BLOCKS = {
    "BatchNormOfPresent": Block(lambda: BatchNormOfPresent(4), lambda n: (drawn(n, 4, 3, 2), torch.arange(n) > 0)),
    "ContextAwareFusion": Block(lambda: blocks.ContextAwareFusion(4), lambda n: maps(4)(n) + maps(4)(n), fused=True),
    "ConvNormReLU": Block(lambda: blocks.ConvNormReLU(3, 4), maps(3)),
    "DepthwiseMultiKernel": Block(lambda: blocks.DepthwiseMultiKernel(3, 4), maps(3, 8), fused=True),
    "DilatedAttention": Block(
        lambda: blocks.DilatedAttention(4, 2, dilations=(1, 2)), lambda n: (drawn(n, 5, 4, 4),), fused=True
    ),
    "EcgDualAttention": Block(lambda: EcgDualAttention(8, 3, leads=2), lambda n: (drawn(n, 8, 2, 3),)),
    "ImageBranch": Block(lambda: blocks.ImageBranch(4), lambda n: (*maps(3)(n), (9, 9))),
    "LayerScale": Block(lambda: blocks.LayerScale(6), lambda n: (drawn(n, 5, 6), drawn(n, 5, 6))),
    "MemoryEfficientAttention": Block(lambda: blocks.MemoryEfficientAttention(8, 2), lambda n: (drawn(n, 5, 8),)),
    "MixingAttention": Block(
        lambda: blocks.MixingAttention(8, 2, in_dim=4), lambda n: (drawn(n, 4, 3, 3), drawn(n, 8, 6, 6))
    ),
    "Mlp": Block(lambda: blocks.Mlp(6, 8), lambda n: (drawn(n, 5, 6),)),
    "MonteCarloAttention": Block(lambda: blocks.MonteCarloAttention(4), maps(4), fused=True),
    "MonteCarloAttention by sample": Block(lambda: blocks.MonteCarloAttention(4, draw="sample"), maps(4), fused=True),
    "PlainUNetDecoder": Block(lambda: blocks.PlainUNetDecoder((4, 6), 3), pyramid),
    "PlainUNetEncoder": Block(lambda: blocks.PlainUNetEncoder(1, (4, 6)), maps(1, 8)),
    "RunningNorm": Block(lambda: RunningNorm(4), lambda n: (drawn(n, 4),)),
    "SwiGLU": Block(lambda: blocks.SwiGLU(6, 8), lambda n: (drawn(n, 5, 6),)),
    "TemporalAwareFusion": Block(lambda: blocks.TemporalAwareFusion(4, ecg_dim=3), with_some_ecgs, fused=True),
    "TemporalAwareFusion by one value": Block(
        lambda: blocks.TemporalAwareFusion(4, ecg_dim=3, projection="broadcast", rectify=True),
        with_some_ecgs,
        fused=True,
    ),
    "TemporalFiLMGate": Block(lambda: blocks.TemporalFiLMGate(4), film, fused=True),
    "TransformerBlock": Block(lambda: blocks.TransformerBlock(8, 2), lambda n: (drawn(n, 5, 8),)),
    "UNetDecoderStage": Block(
        lambda: blocks.UNetDecoderStage(4, 3, side_dims=[2]), lambda n: (drawn(n, 4, 3, 3), [drawn(n, 2, 6, 6)])
    ),
    "WeightedBlockFusion": Block(
        lambda: blocks.WeightedBlockFusion(3, 1), lambda n: ([drawn(n, 5, 4) + i for i in range(3)],), fused=True
    ),
}
"""The blocks by name; those that are not exported are here because a network uses them by themselves."""

FUSED = [name for name, block in BLOCKS.items() if block.fused]


def call(block: nn.Module, given: tuple[Any, ...]) -> Any:
    return block(*given)


def in_float64(given: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, given)


def test_every_block_is_compiled():
    assert set(blocks.__all__) <= {name.split()[0] for name in BLOCKS}


@pytest.mark.parametrize(  # of the slow one, make test compiles evaluation, and the Triton path of training
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "DilatedAttention" else ()) for name in BLOCKS]
)
def test_training_is_one_graph_for_every_batch_size(name):
    """Values, every gradient, running statistics; the draws that a seed makes are those that it makes eagerly."""
    made = BLOCKS[name].make().double()
    inputs = [in_float64(BLOCKS[name].inputs(samples)) for samples in (2, 5)]
    compiler = "aot_eager" if BLOCKS[name].fused else "eager"  # the operators bring gradients of their own to trace
    assert_compiles(made, call, inputs, graphs=1, backend=compiler, dynamic_batch=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_evaluation_is_one_graph_for_every_batch_size(name):
    made = BLOCKS[name].make().double().eval()
    inputs = [in_float64(BLOCKS[name].inputs(samples)) for samples in (2, 5)]
    assert_compiles(made, call, inputs, graphs=1, backend="eager", dynamic_batch=True)


@pytest.mark.parametrize("name", FUSED)
def test_the_triton_path_is_one_graph_for_every_batch_size(name):
    pytest.importorskip("triton", reason="the path is Triton's")
    inputs = [BLOCKS[name].inputs(samples) for samples in (2, 3)]
    with backend("triton"):
        assert_compiles(BLOCKS[name].make(), call, inputs, graphs=1, dynamic_batch=True)


@pytest.mark.parametrize("name", ["MonteCarloAttention by sample", "TemporalAwareFusion"])
def test_nobody_needs_to_say_that_the_batch_is_dynamic(name):
    """The second size compiles for all sizes; a third would compile again if anything held on to a number."""
    made, inputs = BLOCKS[name].make().double(), [in_float64(BLOCKS[name].inputs(samples)) for samples in (2, 3, 5, 7)]
    assert_compiles(made, call, inputs, graphs=2, backend="eager")
