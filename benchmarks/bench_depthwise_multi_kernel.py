"""Depthwise multi-kernel convolution: one merged convolution against the two and the additions it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trifuse.kernels import depthwise_multi_kernel

from .baselines import depthwise_multi_kernel as baselines
from .harness import TINY, Case, Comparison, Pass, clock

KERNELS = (5, 7)


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


def convolutions(count: int):
    """Return the operations of ``count`` convolutions with the one merged kernel, given the arguments."""
    return lambda x, weights: count * 2 * x.numel() * max(weight.shape[-1] for weight in weights) ** 2


COMPARISON = Comparison(
    name="depthwise_multi_kernel",
    cases=[
        *cases((2, 72, 64, 64), torch.float32, "cpu"),
        *cases((2, 288, 16, 16), torch.float32, "cpu"),
        case((8, 72, 64, 64), torch.bfloat16, device="cuda", channels_last=True),
        *cases((32, 72, 64, 64), torch.bfloat16, "cuda"),
        case((1, 2, 8, 8), torch.float32, device=TINY, channels_last=True),
    ],
    passes=[
        Pass("forward", least_bytes=lambda x, weights: 2 * x.nbytes, flops=convolutions(1)),
        Pass(
            "forward + backward",
            leaves=lambda x, weights: [x, *weights],
            least_bytes=lambda x, weights: 5 * x.nbytes,
            flops=convolutions(3),
        ),
    ],
    providers={
        "two convolutions, added": baselines.separate_convolutions,
        "torch.compile of them": baselines.compiled_separate_convolutions,
        "merged by hand": baselines.merged_by_hand,
        "trifuse": depthwise_multi_kernel,
        "torch.compile of trifuse": torch.compile(depthwise_multi_kernel, dynamic=False, fullgraph=True),
    },
    truth=baselines.separate_convolutions,
)


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_depthwise_multi_kernel(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)
