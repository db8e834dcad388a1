"""Instance norm with leaky rectifier, against PyTorch's layers one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trifuse.kernels import instance_norm_leaky_relu

from .baselines import instance_norm_leaky_relu as baselines
from .harness import TINY, Case, Comparison, Pass, clock

Shape = tuple[int, int, int, int]


def case(name: str, shape: Shape, dtype: torch.dtype, device: str, *, channels_last: bool = False) -> Case:
    """Make a case of maps of ``shape``, and a weight and a bias in float32, as a network keeps them.

    The bias keeps what is rectified away from zero, where a gradient jumps with the last bit of a mean.
    """

    def arguments(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(shape, generator=generator, device=device).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = (torch.randn(shape[1], generator=generator, device=device) for _ in range(2))
        return x, weight.clamp(-1, 1) / 8, bias.sign()

    layout = " channels last" if channels_last else ""
    return Case(f"{name}, {shape}{layout} {str(dtype).removeprefix('torch.')}", arguments, (device,))


NORM = Comparison(
    name="instance_norm_leaky_relu",
    cases=[
        case("plain U-Net stage 1", (2, 32, 256, 256), torch.float32, "cpu"),
        case("plain U-Net stage 3", (2, 128, 64, 64), torch.float32, "cpu"),
        case("plain U-Net stage 3", (2, 128, 64, 64), torch.float32, "cpu", channels_last=True),
        case("plain U-Net stage 6", (2, 512, 8, 8), torch.float32, "cpu"),
        case("plain U-Net stage 1", (32, 32, 256, 256), torch.bfloat16, "cuda"),
        case("plain U-Net stage 3", (32, 128, 64, 64), torch.bfloat16, "cuda"),
        case("plain U-Net stage 3", (32, 128, 64, 64), torch.bfloat16, "cuda", channels_last=True),
        case("tiny", (2, 16, 8, 8), torch.bfloat16, TINY),
    ],
    passes=[
        Pass("forward", least_bytes=lambda x, *affine: 2 * x.nbytes),
        Pass("forward + backward", leaves=lambda *arguments: arguments, least_bytes=lambda x, *affine: 5 * x.nbytes),
    ],
    providers={
        "instance norm and leaky ReLU": baselines.norm_then_rectifier,
        "group norm and leaky ReLU": baselines.groups_then_rectifier,
        "torch.compile of it": baselines.compiled_norm,
        "trifuse": instance_norm_leaky_relu,
        "torch.compile of trifuse": torch.compile(instance_norm_leaky_relu, dynamic=False, fullgraph=True),
    },
    truth=baselines.norm_then_rectifier,
)


@pytest.mark.benchmark(timer=clock)
@NORM.parametrize()
def test_instance_norm_leaky_relu(show, case, timed, provider):
    show(NORM, case, timed, provider)
