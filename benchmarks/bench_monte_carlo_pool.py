"""Monte Carlo pooling against what people write without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trifuse.kernels import monte_carlo_pool

from .baselines import monte_carlo_pool as baselines
from .harness import TINY, Case, Comparison, Pass, clock

Shape = tuple[int, int, int, int]


def pool_case(name: str, shape: Shape, scale: int, dtype: torch.dtype, device: str) -> Case:
    """Make a case of maps of ``shape``, shuffled, and the first cell of a grid of ``scale`` x ``scale``."""

    def arguments(device: torch.device) -> tuple[Tensor, int, int, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(shape, generator=generator, device=device).to(dtype)
        return x, scale, 0, torch.randperm(shape[2] * shape[3], generator=generator, device=device)

    return Case(f"{name}, {shape} scale {scale} {str(dtype).removeprefix('torch.')}", arguments, (device,))


def pooled(x: Tensor, scale: int, cell: int, permutation: Tensor) -> Tensor:
    """Call the operator with a case's arguments."""
    return monte_carlo_pool(x, scale=scale, cell=cell, permutation=permutation)


POOL = Comparison(
    name="monte_carlo_pool",
    cases=[
        *(pool_case("FIAS decoder", (2, 72, 64, 64), scale, torch.float32, "cpu") for scale in (1, 2, 3)),
        pool_case("small", (2, 72, 64, 64), 2, torch.bfloat16, "cuda"),
        pool_case("FIAS decoder", (32, 72, 64, 64), 3, torch.bfloat16, "cuda"),
        pool_case("tiny", (2, 8, 8, 8), 2, torch.bfloat16, TINY),
    ],
    passes=[
        Pass("forward", least_bytes=lambda x, scale, *draw: x.nbytes // scale**2),
        Pass(
            "forward + backward",
            leaves=lambda x, *draw: [x],
            least_bytes=lambda x, scale, *draw: x.nbytes // scale**2 + x.nbytes,
        ),
    ],
    providers={
        "shuffle and pool all cells": baselines.shuffled_adaptive_pool,
        "torch.compile of it": baselines.compiled_adaptive_pool,
        "trifuse": pooled,
        "torch.compile of trifuse": torch.compile(pooled, dynamic=False, fullgraph=True),
    },
    truth=baselines.shuffled_adaptive_pool,
)


@pytest.mark.benchmark(timer=clock)
@POOL.parametrize()
def test_monte_carlo_pool(show, case, timed, provider):
    show(POOL, case, timed, provider)
