"""The gate of channels and the gate of positions, against what people write without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trifuse.kernels import channel_gate, spatial_gate

from .baselines import gates as baselines
from .harness import TINY, Case, Comparison, Pass, clock

Shape = tuple[int, int, int, int]


def channel_case(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Make a case of maps of ``shape`` and one gate per channel."""
    return _case(name, shape, shape[:2], dtype, device)


def position_case(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Make a case of maps of ``shape`` and one gate per position."""
    return _case(name, shape, (shape[0], 1, *shape[2:]), dtype, device)


def _case(name: str, shape: Shape, gates: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    def arguments(device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(shape, generator=generator, device=device).to(dtype)
        return x, torch.randn(gates, generator=generator, device=device)

    return Case(f"{name}, {shape} {str(dtype).removeprefix('torch.')}", arguments, (device,))


PASSES = [
    Pass("forward", least_bytes=lambda x, gate: 2 * x.nbytes),
    Pass("forward + backward", leaves=lambda x, gate: [x, gate], least_bytes=lambda x, gate: 5 * x.nbytes),
]

CHANNELS = Comparison(
    name="channel_gate",
    cases=[
        channel_case("FIAS decoder", (2, 72, 64, 64), torch.float32, "cpu"),
        channel_case("FIAS decoder", (2, 576, 8, 8), torch.float32, "cpu"),
        channel_case("large", (16, 256, 64, 64), torch.bfloat16, "cuda"),
        channel_case("small", (8, 512, 16, 16), torch.bfloat16, "cuda"),
        channel_case("tiny", (2, 16, 8, 8), torch.bfloat16, TINY),
    ],
    passes=PASSES,
    providers={
        "sigmoid and multiply": baselines.broadcast_channel_gate,
        "torch.compile of it": baselines.compiled_channel_gate,
        "trifuse": channel_gate,
        "torch.compile of trifuse": torch.compile(channel_gate, dynamic=False, fullgraph=True),
    },
    truth=baselines.broadcast_channel_gate,
)

POSITIONS = Comparison(
    name="spatial_gate",
    cases=[
        position_case("FIAS fusion", (2, 72, 64, 64), torch.float32, "cpu"),
        position_case("FIAS fusion", (2, 576, 8, 8), torch.float32, "cpu"),
        position_case("small", (8, 512, 16, 16), torch.bfloat16, "cuda"),
        position_case("large", (16, 256, 64, 64), torch.bfloat16, "cuda"),
        position_case("tiny", (2, 16, 8, 8), torch.bfloat16, TINY),
    ],
    passes=PASSES,
    providers={
        "sigmoid and multiply": baselines.broadcast_spatial_gate,
        "torch.compile of it": baselines.compiled_spatial_gate,
        "trifuse": spatial_gate,
        "torch.compile of trifuse": torch.compile(spatial_gate, dynamic=False, fullgraph=True),
    },
    truth=baselines.broadcast_spatial_gate,
)


@pytest.mark.benchmark(timer=clock)
@CHANNELS.parametrize()
def test_channel_gate(show, case, timed, provider):
    show(CHANNELS, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@POSITIONS.parametrize()
def test_spatial_gate(show, case, timed, provider):
    show(POSITIONS, case, timed, provider)
