"""Weighted block fusion: the fused operator against what people write without it."""

from __future__ import annotations

import pytest
import torch

from trifuse.kernels import weighted_block_fusion

from . import baselines
from .harness import Case, Comparison, Pass, clock


def fusion_case(name: str, blocks: int, batch: int, tokens: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def arguments(device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        return [normal(batch, tokens, width).to(dtype) for _ in range(blocks)], normal(blocks)

    return Case(name, arguments, (device,))


def one_map(features, logits) -> int:
    return features[0].nbytes


COMPARISON = Comparison(
    name="weighted_block_fusion",
    cases=[
        fusion_case("DINO U-Net base, 12 x (2, 1025, 768) float32", 12, 2, 1025, 768, torch.float32, "cpu"),
        fusion_case("DINO U-Net small, 12 x (2, 1025, 384) float32", 12, 2, 1025, 384, torch.float32, "cpu"),
        fusion_case("DINO U-Net base, 12 x (8, 1025, 768) bfloat16", 12, 8, 1025, 768, torch.bfloat16, "cuda"),
        fusion_case("DINO U-Net base, 12 x (32, 1025, 768) bfloat16", 12, 32, 1025, 768, torch.bfloat16, "cuda"),
        fusion_case("DINO U-Net large, 24 x (32, 1025, 1024) bfloat16", 24, 32, 1025, 1024, torch.bfloat16, "cuda"),
        fusion_case("DINO U-Net giant, 40 x (32, 1025, 1536) bfloat16", 40, 32, 1025, 1536, torch.bfloat16, "cuda"),
    ],
    passes=[
        Pass("forward", least_bytes=lambda features, logits: (len(features) + 1) * one_map(features, logits)),
        Pass(
            "forward + backward, frozen maps",
            leaves=lambda features, logits: [logits],
            least_bytes=lambda features, logits: 2 * (len(features) + 1) * one_map(features, logits),
        ),
        Pass(
            "forward + backward, trained maps",
            leaves=lambda features, logits: [logits, *features],
            least_bytes=lambda features, logits: (3 * len(features) + 2) * one_map(features, logits),
        ),
    ],
    providers={
        "stack + einsum": baselines.stack_einsum,
        "running sum": baselines.running_sum,
        "torch.compile of the running sum": baselines.compiled_running_sum,
        "Liger AttnRes": baselines.liger_attention_residuals,
        "trifuse": weighted_block_fusion,
    },
    truth=baselines.running_sum,
    missing={"Liger AttnRes": baselines.LIGER_MISSING} if baselines.LIGER_MISSING else {},
)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("case", "timed", "provider"), COMPARISON.grid(), ids=lambda part: getattr(part, "name", part))
def test_weighted_block_fusion(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)
