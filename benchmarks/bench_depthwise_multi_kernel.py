"""Depthwise multi-kernel convolution: one merged convolution against the two and the additions it stands for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import depthwise_multi_kernel

from .harness import Case, Comparison, Pass, clock

KERNELS = (5, 7)


def separate_convolutions(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Convolve with each kernel on its own, and add up: what one writes down from the paper."""
    total = x
    for weight in weights:
        total = total + F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2, groups=x.shape[1])
    return total


compiled_separate_convolutions = torch.compile(separate_convolutions, dynamic=False)


def case(shape: tuple[int, int, int, int], dtype: torch.dtype, *, device: str, channels_last: bool) -> Case:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def arguments(device: torch.device) -> tuple[Tensor, list[Tensor]]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(shape, generator=generator, device=device).to(dtype, memory_format=memory_format)
        weights = [torch.randn(shape[1], 1, k, k, generator=generator, device=device).to(dtype) / k for k in KERNELS]
        return x, weights

    layout = "channels_last" if channels_last else "NCHW"
    size = str(shape).replace(" ", "")
    return Case(f"FIAS {size} {layout} {str(dtype).removeprefix('torch.')}", arguments, (device,))


def cases(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[Case]:
    return [case(shape, dtype, device=device, channels_last=channels_last) for channels_last in (False, True)]


COMPARISON = Comparison(
    name="depthwise_multi_kernel",
    cases=[
        *cases((2, 72, 64, 64), torch.float32, "cpu"),
        *cases((2, 288, 16, 16), torch.float32, "cpu"),
        *cases((8, 72, 64, 64), torch.bfloat16, "cuda"),
        *cases((32, 72, 64, 64), torch.bfloat16, "cuda"),
    ],
    passes=[
        Pass("forward", least_bytes=lambda x, weights: 2 * x.nbytes),
        Pass(
            "forward + backward",
            leaves=lambda x, weights: [x, *weights],
            least_bytes=lambda x, weights: 5 * x.nbytes,
        ),
    ],
    providers={
        "two convolutions, added": separate_convolutions,
        "torch.compile of them": compiled_separate_convolutions,
        "trifuse": depthwise_multi_kernel,
    },
    truth=separate_convolutions,
)


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_depthwise_multi_kernel(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)
