"""Labels from coarse logits: fused against interpolation, sum and argmax at full resolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trifuse.kernels import upsample_argmax

from .baselines import upsample_argmax as baselines
from .harness import TINY, Case, Comparison, Pass, clock


def case(
    name: str, batch: int, classes: int, sides: tuple[int, ...], size: int, dtype: torch.dtype, device: str
) -> Case:
    def arguments(device: torch.device) -> tuple[list[Tensor], tuple[int, int]]:
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(batch, classes, side, side) for side in sides]
        return [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes], (size, size)

    coarse = " + ".join(map(str, sides))
    return Case(f"{name}, {batch} x {classes} classes, {coarse} to {size}", arguments, (device,))


FIAS = (16, 32, 64)
COMPARISON = Comparison(
    name="upsample_argmax",
    cases=[
        case("FIAS", 2, 9, FIAS, 256, torch.float32, "cpu"),
        case("FIAS, native size", 2, 9, FIAS, 512, torch.float32, "cpu"),
        case("DINO U-Net, native size", 2, 2, (448,), 640, torch.float32, "cpu"),
        case("FIAS", 2, 9, FIAS, 256, torch.float32, "cuda"),
        case("FIAS, native size", 32, 9, FIAS, 512, torch.float32, "cuda"),
        case("tiny", 1, 2, (2, 4), 6, torch.float32, TINY),
    ],
    passes=[
        Pass(
            "labels",
            least_bytes=lambda logits, size: sum(m.nbytes for m in logits) + logits[0].shape[0] * size[0] * size[1],
        )
    ],
    providers={
        "interpolate, sum, argmax": baselines.interpolate_sum_argmax,
        "interpolate, sum, max": baselines.interpolate_sum_max,
        "torch.compile of argmax": baselines.compiled_interpolate_sum_argmax,
        "trifuse": upsample_argmax,
        "torch.compile of trifuse": torch.compile(upsample_argmax, dynamic=False, fullgraph=True),
    },
    truth=baselines.interpolate_sum_argmax,
)


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_upsample_argmax(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)
