"""Residual sum with its layer norm, against PyTorch's operations one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trifuse.kernels import residual_layer_norm

from .baselines import residual_layer_norm as baselines
from .harness import TINY, Case, Comparison, Pass, clock


def case(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, *, scaled: bool = False) -> Case:
    """Make a case of tokens of ``shape``, with a weight, a bias and, for some, a layer scale, all of one type.

    What is normalised is the sum as it is rounded to that type, and so is the gradient of the weight.
    """

    def arguments(device: torch.device) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        x, branch = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
        sizes = [shape[-1]] * (3 if scaled else 2)
        small = (torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)
        return x, branch, *small

    factor = " with layer scale" if scaled else ""
    return Case(f"{name}, {shape}{factor} {str(dtype).removeprefix('torch.')}", arguments, (device,))


def both(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Call the operator as a transformer's block does."""
    return residual_layer_norm(x, branch, weight, bias, layer_scale=layer_scale, eps=1e-6)


NORM = Comparison(
    name="residual_layer_norm",
    cases=[
        case("DINOv2 base", (2, 1025, 768), torch.float32, "cpu", scaled=True),
        case("DilateFormer stage 1", (2, 64, 64, 72), torch.float32, "cpu"),
        case("DilateFormer stage 3", (2, 16, 16, 288), torch.float32, "cpu"),
        case("DINOv2 base", (32, 1025, 768), torch.bfloat16, "cuda", scaled=True),
        case("DilateFormer stage 1", (32, 64, 64, 72), torch.bfloat16, "cuda"),
        case("DilateFormer stage 3", (32, 16, 16, 288), torch.bfloat16, "cuda"),
        case("tiny", (2, 16, 24), torch.bfloat16, TINY, scaled=True),
    ],
    passes=[
        Pass("forward", least_bytes=lambda x, branch, *small: 4 * x.nbytes),
        Pass(
            "forward + backward",
            leaves=lambda *arguments: arguments,
            least_bytes=lambda x, branch, *small: (8 if len(small) == 2 else 10) * x.nbytes,
        ),
    ],
    providers={
        "add and layer norm": baselines.add_then_norm,
        "torch.compile of it": baselines.compiled_add_then_norm,
        "trifuse": both,
        "torch.compile of trifuse": torch.compile(both, dynamic=False, fullgraph=True),
    },
    truth=baselines.add_then_norm,
)


@pytest.mark.benchmark(timer=clock)
@NORM.parametrize()
def test_residual_layer_norm(show, case, timed, provider):
    show(NORM, case, timed, provider)
