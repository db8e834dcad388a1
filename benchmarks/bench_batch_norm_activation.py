"""Batch norm with activation in training, against PyTorch's layers one after the other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from trifuse.kernels import batch_norm_activation

from .baselines import batch_norm_activation as baselines
from .harness import TINY, Case, Comparison, Pass, clock

Shape = tuple[int, int, int, int]
Arguments = tuple[Tensor, None, None, Tensor, Tensor]


def case(name: str, shape: Shape, dtype: torch.dtype, device: str, *, channels_last: bool = False) -> Case:
    """Make a case of maps of ``shape``, and a weight and a bias in float32, as a network keeps them.

    The bias keeps what is rectified away from zero, where a gradient jumps with the last bit of a mean.
    """

    def arguments(device: torch.device) -> Arguments:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(shape, generator=generator, device=device).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = (torch.randn(shape[1], generator=generator, device=device) for _ in range(2))
        return x, None, None, weight.clamp(-1, 1) / 8, bias.sign()

    layout = " channels last" if channels_last else ""
    return Case(f"{name}, {shape}{layout} {str(dtype).removeprefix('torch.')}", arguments, (device,))


def _learned(x: Tensor, mean: None, variance: None, *affine: Tensor) -> tuple[Tensor, ...]:
    return x, *affine


trained = partial(batch_norm_activation, training=True)
NORM = Comparison(
    name="batch_norm_activation",
    cases=[
        case("DINO-UNet stage 1", (2, 256, 64, 64), torch.float32, "cpu"),
        case("DINO-UNet stage 1", (2, 256, 64, 64), torch.float32, "cpu", channels_last=True),
        case("DINO-UNet stage 3", (2, 64, 256, 256), torch.float32, "cpu", channels_last=True),
        case("FIAS stage 4", (2, 576, 8, 8), torch.float32, "cpu"),
        case("DINO-UNet stage 3", (32, 64, 256, 256), torch.bfloat16, "cuda"),
        case("DINO-UNet stage 3", (32, 64, 256, 256), torch.bfloat16, "cuda", channels_last=True),
        case("FIAS stage 2", (2, 144, 32, 32), torch.bfloat16, "cuda", channels_last=True),
        case("tiny", (2, 16, 8, 8), torch.bfloat16, TINY),
    ],
    passes=[
        Pass("forward", least_bytes=lambda x, *small: 2 * x.nbytes),
        Pass("forward + backward", leaves=_learned, least_bytes=lambda x, *small: 5 * x.nbytes),
    ],
    providers={
        "batch norm and ReLU": baselines.norm_then_rectifier,
        "batch norm and ReLU in place": baselines.norm_then_rectifier_in_place,
        "torch.compile of them": baselines.compiled_norm,
        "trifuse": trained,
        "torch.compile of trifuse": torch.compile(trained, dynamic=False, fullgraph=True),
    },
    truth=baselines.norm_then_rectifier,
)


@pytest.mark.benchmark(timer=clock)
@NORM.parametrize()
def test_batch_norm_activation(show, case, timed, provider):
    show(NORM, case, timed, provider)
