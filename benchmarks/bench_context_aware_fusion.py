"""Context-aware fusion against its equations as they are written."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from trifuse.blocks import ContextAwareFusion

from .baselines import context_aware_fusion as baselines
from .harness import TINY, Case, Comparison, Pass, clock

PARAMETERS = [name for name, _ in ContextAwareFusion(1).named_parameters()]


def fusion_case(dim: int, side: int, batch: int, device: str) -> Case:
    """Make a case of one stage of FIAS: two maps and the block's parameters."""

    def arguments(device: torch.device) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randn(batch, dim, side, side, generator=generator).to(device) for _ in range(2)]
        block = as_written(dim)
        block.reset_parameters(generator)
        return *maps, *(parameter.detach().to(device) for parameter in block.parameters())

    return Case(f"FIAS stage of {dim} channels, batch {batch}, {side} x {side} float32", arguments, (device,))


def fused(first: Tensor, second: Tensor, *parameters: Tensor) -> Tensor:
    """Call the block with a case's parameters."""
    named = dict(zip(PARAMETERS, parameters, strict=True))
    return functional_call(block_of(first.shape[1]), named, (first, second))


@cache
def block_of(dim: int) -> ContextAwareFusion:
    """Return a block whose own parameters are never used, so that making it is not timed."""
    with torch.device("meta"):
        return as_written(dim)


def as_written(dim: int) -> ContextAwareFusion:
    """Return a block that computes what the equations say, as its comparisons do."""
    return ContextAwareFusion(dim, channel_weights="literal")


def maps_moved(count: int):
    """Return the bytes of ``count`` maps, given the arguments."""
    return lambda first, *others: count * first.nbytes


def projections(count: int):
    """Return the operations of ``count`` times the projection that is pooled and the one that fuses."""

    def operations(first: Tensor, second: Tensor, *parameters: Tensor) -> int:
        named = dict(zip(PARAMETERS, parameters, strict=True))
        positions = first.numel() // first.shape[1]
        return count * 2 * positions * (named["pre.weight"].numel() + named["reduce.weight"].numel())

    return operations


STAGES = [(72, 64), (144, 32), (288, 16), (576, 8)]

FUSION = Comparison(
    name="context_aware_fusion",
    cases=[
        *(fusion_case(dim, side, 2, "cpu") for dim, side in STAGES),
        *(fusion_case(dim, side, 16, "cuda") for dim, side in STAGES[:3:2]),
        fusion_case(16, 8, 2, TINY),
    ],
    passes=[
        Pass("forward", least_bytes=maps_moved(3), flops=projections(1)),
        Pass(
            "forward + backward",
            leaves=lambda *tensors: tensors,
            least_bytes=maps_moved(8),
            flops=projections(3),
        ),
    ],
    providers={
        "the equations as written": baselines.fusion_by_the_equations,
        "torch.compile of them": baselines.compiled_fusion,
        "trifuse": fused,
        "torch.compile of trifuse": torch.compile(fused, dynamic=False),
    },
    truth=baselines.fusion_by_the_equations,
)


@pytest.mark.benchmark(timer=clock)
@FUSION.parametrize()
def test_context_aware_fusion(show, case, timed, provider):
    show(FUSION, case, timed, provider)
