"""Weighted block fusion: the fused operator against what people write without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trifuse.kernels import weighted_block_fusion

from .baselines import weighted_block_fusion as baselines
from .harness import TINY, Case, Comparison, Pass, clock


def fusion_case(
    name: str, blocks: int, shape: tuple[int, int, int], dtype: torch.dtype, *, device: str, equal: bool = False
) -> Case:
    """Make a case of ``blocks`` maps of ``shape`` (B, M, D), with drawn or with equal logits."""

    def arguments(device: torch.device) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        maps = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(blocks)]
        logits = torch.randn(blocks, generator=generator, device=device)
        return maps, torch.zeros_like(logits) if equal else logits

    size = f"{blocks} x {shape}".replace(" ", "")
    return Case(f"{name}, {size} {str(dtype).removeprefix('torch.')}", arguments, (device,))


def maps_moved(count: Callable[[int], int]) -> Callable[..., int]:
    """Return the bytes of ``count(N)`` maps as a function of the arguments."""
    return lambda features, logits: count(len(features)) * features[0].nbytes


FORWARD = Pass("forward", least_bytes=maps_moved(lambda n: n + 1))
BASE, LARGE, GIANT = (1025, 768), (1025, 1024), (1025, 1536)

compiled_fusion = torch.compile(weighted_block_fusion, dynamic=False, fullgraph=True)
COMPARISON = Comparison(
    name="weighted_block_fusion",
    cases=[
        fusion_case("small", 12, (2, 256, 384), torch.float32, device="cpu"),
        fusion_case("DINO U-Net base", 12, (2, *BASE), torch.float32, device="cpu"),
        fusion_case("DINO U-Net large", 24, (2, *LARGE), torch.float32, device="cpu"),
        fusion_case("DINO U-Net base", 12, (8, *BASE), torch.bfloat16, device="cuda"),
        fusion_case("DINO U-Net base", 12, (32, *BASE), torch.bfloat16, device="cuda"),
        fusion_case("DINO U-Net giant", 40, (32, *GIANT), torch.bfloat16, device="cuda"),
        fusion_case("tiny", 12, (2, 5, 64), torch.bfloat16, device=TINY),
    ],
    passes=[
        FORWARD,
        Pass(
            "forward + backward, frozen maps",
            leaves=lambda features, logits: [logits],
            least_bytes=maps_moved(lambda n: 2 * n + 2),
        ),
        Pass(
            "forward + backward, trained maps",
            leaves=lambda features, logits: [logits, *features],
            least_bytes=maps_moved(lambda n: 3 * n + 2),
        ),
    ],
    providers={
        "stack + einsum": baselines.stack_einsum,
        "running sum": baselines.running_sum,
        "torch.compile of the running sum": baselines.compiled_running_sum,
        "trifuse": weighted_block_fusion,
        "torch.compile of trifuse": compiled_fusion,
    },
    truth=baselines.running_sum,
)

AGAINST_LIGER = Comparison(
    name="weighted_block_fusion_liger",
    cases=[
        fusion_case("DINO U-Net base", 12, (2, *BASE), torch.float32, device="cpu", equal=True),
        fusion_case("DINO U-Net base", 12, (32, *BASE), torch.bfloat16, device="cuda", equal=True),
        fusion_case("DINO U-Net giant", 40, (8, *GIANT), torch.bfloat16, device="cuda", equal=True),
        fusion_case("tiny", 12, (2, 5, 64), torch.bfloat16, device=TINY, equal=True),
    ],
    passes=[
        FORWARD,
        Pass(
            "forward + backward, the maps' gradients",
            leaves=lambda features, logits: features,
            least_bytes=maps_moved(lambda n: 2 * n + 2),
        ),
    ],
    providers={
        "stack + einsum": baselines.stack_einsum,
        "torch.compile of the running sum": baselines.compiled_running_sum,
        "Liger AttnRes": baselines.liger_attention_residuals,
        "trifuse": weighted_block_fusion,
        "torch.compile of trifuse": compiled_fusion,
    },
    truth=baselines.running_sum,
    missing={"Liger AttnRes": baselines.LIGER_MISSING} if baselines.LIGER_MISSING else {},
)


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_weighted_block_fusion(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@AGAINST_LIGER.parametrize()
def test_against_liger(show, case, timed, provider):
    show(AGAINST_LIGER, case, timed, provider)
