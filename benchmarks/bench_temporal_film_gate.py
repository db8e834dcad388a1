"""The temporal FiLM gate, against the same equations as people write them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trifuse.kernels import temporal_film_gate

from .baselines import temporal_film_gate as baselines
from .harness import TINY, Case, Comparison, Pass, clock

Shape = tuple[int, int, int, int]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def case(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Make a case of maps of ``shape``, and what a network computes in float32 for each sample."""

    def arguments(device: torch.device) -> Arguments:
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(shape, generator=generator, device=device).to(dtype)
        ecg, scale, shift = (torch.randn(shape[:2], generator=generator, device=device) for _ in range(3))
        weights = torch.softmax(torch.randn(shape[0], 2, generator=generator, device=device), dim=1)
        return features, ecg, weights, scale, shift

    return Case(f"{name}, {shape} {str(dtype).removeprefix('torch.')}", arguments, (device,))


FILM = Comparison(
    name="temporal_film_gate",
    cases=[
        case("small", (2, 512, 8, 8), torch.float32, "cpu"),
        case("TAFF-UNet stage 3", (8, 256, 32, 32), torch.float32, "cpu"),
        case("large", (8, 64, 128, 128), torch.float32, "cpu"),
        case("TAFF-UNet stage 3", (32, 256, 32, 32), torch.bfloat16, "cuda"),
        case("TAFF-UNet stage 3", (8, 256, 32, 32), torch.bfloat16, "cuda"),
        case("tiny", (2, 16, 8, 8), torch.bfloat16, TINY),
    ],
    passes=[
        Pass("forward", least_bytes=lambda features, *small: 2 * features.nbytes),
        Pass(
            "forward + backward",
            leaves=lambda *arguments: arguments,
            least_bytes=lambda features, *small: 5 * features.nbytes,
        ),
    ],
    providers={
        "as written": baselines.film_by_the_equations,
        "torch.compile of it": baselines.compiled_film,
        "trifuse": temporal_film_gate,
        "torch.compile of trifuse": torch.compile(temporal_film_gate, dynamic=False, fullgraph=True),
    },
    truth=baselines.film_by_the_equations,
)


@pytest.mark.benchmark(timer=clock)
@FILM.parametrize()
def test_temporal_film_gate(show, case, timed, provider):
    show(FILM, case, timed, provider)
