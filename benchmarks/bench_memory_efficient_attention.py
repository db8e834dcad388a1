"""Memory-efficient attention: the dispatcher against attention as defined, and against the peers called directly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trifuse.kernels import memory_efficient_attention

from .baselines import memory_efficient_attention as baselines
from .harness import TINY, Case, Comparison, Pass, clock


def attention_case(name: str, batch: int, tokens: int, heads: int, dtype: torch.dtype, device: str) -> Case:
    """Make a case of q, k, v (B, M, h, 64), slices of one packed projection as the ViT's blocks deliver them."""

    def arguments(device: torch.device) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        packed = torch.randn(batch, tokens, 3, heads, 64, generator=generator, device=device).to(dtype)
        return packed.unbind(2)

    return Case(f"{name}, ({batch},{tokens},{heads},64) {str(dtype).removeprefix('torch.')}", arguments, (device,))


def products(count: int):
    """Return the operations of ``count`` products of two matrices with the scores' M x M, given the arguments."""
    return lambda q, k, v: count * 2 * q.numel() * k.shape[1]


OBSTACLE = baselines.xformers_obstacle()
COMPARISON = Comparison(
    name="memory_efficient_attention",
    cases=[
        attention_case("small", 2, 257, 6, torch.float32, "cpu"),
        attention_case("DINOv2 base", 2, 1025, 12, torch.float32, "cpu"),
        attention_case("DINOv2 base", 2, 1025, 12, torch.bfloat16, "cuda"),
        attention_case("DINOv2 base", 32, 1025, 12, torch.bfloat16, "cuda"),
        attention_case("DINOv2 giant", 8, 1025, 24, torch.bfloat16, "cuda"),
        attention_case("tiny", 2, 17, 2, torch.bfloat16, TINY),
    ],
    passes=[
        Pass("forward", least_bytes=lambda q, k, v: 4 * q.nbytes, flops=products(2)),
        Pass(
            "forward + backward",
            leaves=lambda q, k, v: [q, k, v],
            least_bytes=lambda q, k, v: 11 * q.nbytes,
            flops=products(6),
        ),
    ],
    providers={
        "softmax(q k) v": baselines.attention_by_definition,
        "torch.compile of it": baselines.compiled_attention_by_definition,
        "SDPA": baselines.attention_by_sdpa,
        "xformers": baselines.attention_by_xformers,
        "trifuse": memory_efficient_attention,
        "torch.compile of trifuse": torch.compile(memory_efficient_attention, dynamic=False, fullgraph=True),
    },
    truth=baselines.attention_by_definition,
    kernels=False,
    missing={"xformers": OBSTACLE} if OBSTACLE else {},
)


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_attention(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)
