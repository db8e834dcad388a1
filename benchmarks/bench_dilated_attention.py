"""Dilated attention: the fused operator against the published form and what people write without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trifuse.kernels.dilated_attention import dilated_attention, packed_dilated_attention

from . import dilated_attention_baselines as baselines
from .harness import Case, Comparison, Pass, clock

HEAD_DIM = 24


def attention_case(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, *, device: str) -> Case:
    """Make a case of queries, keys and values of ``shape`` (B, H, W, C) packed into one map (B, H, W, 3 C)."""

    def arguments(device: torch.device) -> tuple[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        b, h, w, c = shape
        return (torch.randn(b, h, w, 3 * c, generator=generator, device=device).to(dtype),)

    b, h, w, c = shape
    return Case(f"{name}, ({b},{h},{w},3x{c}) {str(dtype).removeprefix('torch.')}", arguments, (device,))


def from_packed(attend: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """Give a form of attention the slices of a packed map, heads of 24 channels."""

    def attend_packed(qkv: Tensor) -> Tensor:
        return attend(*qkv.chunk(3, dim=-1), num_heads=qkv.shape[-1] // 3 // HEAD_DIM)

    return attend_packed


def fused_from_packed(qkv: Tensor) -> Tensor:
    """Attend as the block does: one packed map in, one packed gradient out."""
    return packed_dilated_attention(qkv, num_heads=qkv.shape[-1] // 3 // HEAD_DIM)


def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.compile(function, dynamic=False)


PASSES = [
    Pass("forward", least_bytes=lambda qkv: qkv.nbytes * 4 // 3),
    Pass("forward + backward", leaves=lambda qkv: [qkv], least_bytes=lambda qkv: qkv.nbytes * 4),
]
PROVIDERS = {
    "unfold, as published": from_packed(baselines.unfold_attention),
    "slices of padded maps": from_packed(baselines.shift_attention),
    "torch.compile of slices": compiled(from_packed(baselines.shift_attention)),
    "NATTEN, padded and cropped": from_packed(baselines.natten_attention),
    "FlexAttention": from_packed(baselines.flex_attention_by_windows),
    "trifuse": from_packed(dilated_attention),
    "trifuse, packed": fused_from_packed,
    "torch.compile of trifuse": compiled(from_packed(dilated_attention)),
}
REASONS = {"NATTEN, padded and cropped": baselines.NATTEN_MISSING, "FlexAttention": baselines.FLEX_MISSING}
MISSING = {name: reason for name, reason in REASONS.items() if reason}


def stage(number: int, shape: tuple[int, int, int]) -> list[Case]:
    name = f"DilateFormer stage {number}"
    on_gpu = [attention_case(name, (batch, *shape), torch.bfloat16, device="cuda") for batch in (2, 8, 32)]
    return [attention_case(name, (2, *shape), torch.float32, device="cpu"), *on_gpu]


COMPARISON = Comparison(
    name="dilated_attention",
    cases=stage(1, (64, 64, 72)),
    passes=PASSES,
    providers=PROVIDERS | {"torch.compile of unfold": compiled(from_packed(baselines.unfold_attention))},
    truth=from_packed(baselines.unfold_attention),
    missing=MISSING,
)

# Here PyTorch's compiler (2.13, CPU) fails on the unfold form of two heads without gradients.
STAGE_2 = Comparison(
    name="dilated_attention_stage_2",
    cases=stage(2, (32, 32, 144)),
    passes=PASSES,
    providers=PROVIDERS,
    truth=from_packed(baselines.unfold_attention),
    missing=MISSING,
)


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_dilated_attention(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@STAGE_2.parametrize()
def test_second_stage(show, case, timed, provider):
    show(STAGE_2, case, timed, provider)
