"""The segment FiLM gate, against the same equations as people write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trifuse.kernels import segment_film_gate

from .baselines import segment_film_gate as baselines
from .harness import TINY, Case, Comparison, Pass, clock

Shape = tuple[int, int, int, int]
SEGMENTS = 17  # of the AHA


def case(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Make a case of maps of ``shape``, their labels, and what a network computes in float32 for each sample."""
    batch, channels = shape[:2]

    def arguments(device: torch.device) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(shape, generator=generator, device=device).to(dtype)
        labels = torch.randint(0, SEGMENTS + 1, (batch, *shape[2:]), generator=generator, device=device)
        shared, scale, shift = (torch.randn(batch, channels, generator=generator, device=device) for _ in range(3))
        scores = torch.randn(batch, SEGMENTS, generator=generator, device=device)
        direction = torch.randn(channels, generator=generator, device=device)
        weights = torch.softmax(torch.randn(batch, 2, generator=generator, device=device), dim=1)
        return features, labels.to(torch.uint8), shared, scores, direction, weights, scale, shift

    return Case(f"{name}, {shape} {str(dtype).removeprefix('torch.')}", arguments, (device,))


def without_labels(features: Tensor, segments: Tensor, *small: Tensor) -> tuple[Tensor, ...]:
    """Return the arguments that get a gradient."""
    return features, *small


FILM = Comparison(
    name="segment_film_gate",
    cases=[
        case("small", (2, 512, 8, 8), torch.float32, "cpu"),
        case("TAFF-UNet stage 3", (8, 256, 32, 32), torch.float32, "cpu"),
        case("large", (8, 64, 128, 128), torch.float32, "cpu"),
        case("TAFF-UNet stage 3", (32, 256, 32, 32), torch.bfloat16, "cuda"),
        case("TAFF-UNet stage 3", (8, 256, 32, 32), torch.bfloat16, "cuda"),
        case("tiny", (2, 16, 8, 8), torch.bfloat16, TINY),
    ],
    passes=[
        Pass("forward", least_bytes=lambda features, segments, *small: 2 * features.nbytes + segments.nbytes),
        Pass(
            "forward + backward",
            leaves=without_labels,
            least_bytes=lambda features, segments, *small: 5 * features.nbytes + 2 * segments.nbytes,
        ),
    ],
    providers={
        "as written": baselines.segment_film_by_the_equations,
        "with masks": baselines.segment_film_by_masks,
        "torch.compile of it": baselines.compiled_segment_film,
        "trifuse": segment_film_gate,
        "torch.compile of trifuse": torch.compile(segment_film_gate, dynamic=False, fullgraph=True),
    },
    truth=baselines.segment_film_by_the_equations,
)


@pytest.mark.benchmark(timer=clock)
@FILM.parametrize()
def test_segment_film_gate(show, case, timed, provider):
    show(FILM, case, timed, provider)
