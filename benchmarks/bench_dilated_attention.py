"""Dilated attention: the fused operator against the published form, what people write without it, and two peers.

What a compiler makes of a form is built once for each case and pass, so a GPU's list of cases is short: at each stage
the shapes at which launches or bandwidth decide, and a head dim of 32, to which the peers would pad one of 24.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from trifuse.kernels.ops.dilated_attention import dilated_attention, dilated_attention_weights, packed_dilated_attention

from .baselines import dilated_attention as baselines
from .harness import TINY, Case, Comparison, Pass, clock

HEAD_DIM, WIDE_HEAD_DIM = 24, 32
Shape = tuple[int, int, int, int]


def attention_case(name: str, shape: Shape, dtype: torch.dtype, *, device: str) -> Case:
    """Make a case of queries, keys and values of ``shape`` (B, H, W, C) packed into one map (B, H, W, 3 C)."""

    def arguments(device: torch.device) -> tuple[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        b, h, w, c = shape
        return (torch.randn(b, h, w, 3 * c, generator=generator, device=device).to(dtype),)

    b, h, w, c = shape
    return Case(f"{name}, ({b},{h},{w},3x{c}) {str(dtype).removeprefix('torch.')}", arguments, (device,))


def from_packed(attend: Callable[..., Tensor], head_dim: int = HEAD_DIM) -> Callable[[Tensor], Tensor]:
    """Return a form of attention that takes a packed map."""

    def attend_packed(qkv: Tensor) -> Tensor:
        return attend(*qkv.chunk(3, dim=-1), num_heads=qkv.shape[-1] // 3 // head_dim)

    return attend_packed


def weights_from_packed(weigh: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a form of the attention map that takes the first two slices of a packed map."""

    def weigh_packed(qkv: Tensor) -> Tensor:
        return weigh(*qkv.chunk(3, dim=-1)[:2], num_heads=qkv.shape[-1] // 3 // HEAD_DIM)

    return weigh_packed


def fused_from_packed(qkv: Tensor, head_dim: int = HEAD_DIM) -> Tensor:
    """Attend as the block does: one packed map in, one packed gradient out."""
    return packed_dilated_attention(qkv, num_heads=qkv.shape[-1] // 3 // head_dim)


def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.compile(function, dynamic=False)


PASSES = [
    Pass("forward", least_bytes=lambda qkv: qkv.nbytes * 4 // 3),
    Pass("forward + backward", leaves=lambda qkv: [qkv], least_bytes=lambda qkv: qkv.nbytes * 11 // 3),
]
BY_HAND = {
    "unfold, as published": from_packed(baselines.unfold_attention),
    "slices of padded maps": from_packed(baselines.shift_attention),
    "torch.compile of slices": compiled(from_packed(baselines.shift_attention)),
}
PEERS = {
    "NATTEN, padded and cropped": from_packed(baselines.natten_attention),
    "FlexAttention": from_packed(baselines.flex_attention_by_windows),
}
OURS = {
    "trifuse": from_packed(dilated_attention),
    "trifuse, packed": fused_from_packed,
    "torch.compile of trifuse": compiled(from_packed(dilated_attention)),
}
REASONS = {"NATTEN, padded and cropped": baselines.NATTEN_MISSING, "FlexAttention": baselines.FLEX_MISSING}
MISSING = {name: reason for name, reason in REASONS.items() if reason}


def stage(number: int, shape: tuple[int, int, int], batches: tuple[int, ...]) -> list[Case]:
    name = f"DilateFormer stage {number}"
    on_gpu = [attention_case(name, (batch, *shape), torch.bfloat16, device="cuda") for batch in batches]
    tiny = attention_case("tiny", (1, 6, 5, shape[-1]), torch.bfloat16, device=TINY)
    return [attention_case(name, (2, *shape), torch.float32, device="cpu"), *on_gpu, tiny]


COMPARISON = Comparison(
    name="dilated_attention",
    cases=stage(1, (64, 64, 72), (2, 32)),
    passes=PASSES,
    providers=BY_HAND | PEERS | OURS | {"torch.compile of unfold": compiled(from_packed(baselines.unfold_attention))},
    truth=from_packed(baselines.unfold_attention),
    missing=MISSING,
)

# Here PyTorch's compiler (2.13, CPU) fails on the unfold form of two heads without gradients.
STAGE_2 = Comparison(
    name="dilated_attention_stage_2",
    cases=stage(2, (32, 32, 144), (8,)),
    passes=PASSES,
    providers=BY_HAND | PEERS | OURS,
    truth=from_packed(baselines.unfold_attention),
    missing=MISSING,
)

WIDE_HEADS = Comparison(
    name="dilated_attention_head_dim_32",
    cases=[
        attention_case("three heads of 32", (1, 64, 64, 96), torch.float32, device="cpu"),
        attention_case("three heads of 32", (8, 64, 64, 96), torch.bfloat16, device="cuda"),
        attention_case("tiny", (1, 6, 5, 96), torch.bfloat16, device=TINY),
    ],
    passes=PASSES,
    providers={
        "unfold, as published": from_packed(baselines.unfold_attention, WIDE_HEAD_DIM),
        "torch.compile of slices": compiled(from_packed(baselines.shift_attention, WIDE_HEAD_DIM)),
        "NATTEN, padded and cropped": from_packed(baselines.natten_attention, WIDE_HEAD_DIM),
        "FlexAttention": from_packed(baselines.flex_attention_by_windows, WIDE_HEAD_DIM),
        "trifuse": from_packed(dilated_attention, WIDE_HEAD_DIM),
        "trifuse, packed": partial(fused_from_packed, head_dim=WIDE_HEAD_DIM),
        "torch.compile of trifuse": compiled(from_packed(dilated_attention, WIDE_HEAD_DIM)),
    },
    truth=from_packed(baselines.unfold_attention, WIDE_HEAD_DIM),
    missing=MISSING,
)


def weights_bytes(maps: int, weights: int) -> Callable[[Tensor], int]:
    """Return the bytes of so many maps (B, H, W, C) and so many attention maps, given the arguments."""
    return lambda qkv: qkv.nbytes // 3 * maps + qkv.nbytes // 3 // HEAD_DIM * 9 * weights


WEIGHTS = Comparison(
    name="dilated_attention_weights",
    cases=stage(1, (64, 64, 72), (2,)),
    passes=[
        Pass("forward", least_bytes=weights_bytes(2, 1)),
        Pass("forward + backward", leaves=lambda qkv: [qkv], least_bytes=weights_bytes(6, 2)),
    ],
    providers={
        "unfold, as published": weights_from_packed(baselines.unfold_weights),
        "torch.compile of unfold": compiled(weights_from_packed(baselines.unfold_weights)),
        "trifuse": weights_from_packed(dilated_attention_weights),
        "torch.compile of trifuse": compiled(weights_from_packed(dilated_attention_weights)),
    },
    truth=weights_from_packed(baselines.unfold_weights),
    kernels=False,
)


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_dilated_attention(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@STAGE_2.parametrize()
def test_second_stage(show, case, timed, provider):
    show(STAGE_2, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@WIDE_HEADS.parametrize()
def test_wide_heads(show, case, timed, provider):
    show(WIDE_HEADS, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@WEIGHTS.parametrize()
def test_dilated_attention_weights(show, case, timed, provider):
    show(WEIGHTS, case, timed, provider)
