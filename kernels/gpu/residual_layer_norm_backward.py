"""Triton kernels of the residual sum and its layer norm, backward, on the tiles of the forward pass.

One launch reads both gradients and the sum, normalises that anew, and writes the gradient that the residual and the
branch share; the branch's is written apart where factors or types set it apart, and the branch is read where its
factors are trained. Every program adds up its tokens' shares of the gradients of weight, bias and factors in a fixed
order; a second launch adds up the programs'. No atomics: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* backward, B=32 M=4096 C=72: 8.12 bytes per element, least 8.00; 17.8 us, floor 17.6 us
* backward, branch apart, B=32 M=4096 C=72: 10.12 bytes per element, least 10.00; 22.2 us, floor 21.9 us
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .maps import THREADS, WARP_SIZE
from .residual_layer_norm import (
    branch_factor,
    dense,
    load_channels,
    row_sum,
    rows_of,
    strides_of,
    tile_of,
    token_offsets,
    unit_of,
)

MOST_PARTS = 1024  # of sums over tokens; fixed, so that the order of summation does not depend on the device
LEAST_TILES = 8  # of a part
PARTS_AT_ONCE, CHANNELS_AT_ONCE = 128, 16  # of the sums that make the gradients of weight, bias and factors


@triton.jit
def _residual_layer_norm_bwd_kernel(
    total_grad,  # (B, M, C), or None
    grad,  # (B, M, C): of what is normalised
    total,  # (B, M, C)
    branch,  # (B, M, C), or None where its factors are not trained
    weight,  # (C,), or None
    layer_scale,  # (C,), or None
    sample_scale,  # (B,), or None
    means,  # (B * M,)
    rstds,  # (B * M,)
    x_grad,  # (B * M, C), or None
    branch_grad,  # (B * M, C), or None where it is that of x
    sums,  # (programs, 3, C): the shares of weight, bias and factors; or None
    count,  # B * M
    tokens,  # M
    channel_units,
    total_grad_strides,
    grad_strides,
    total_strides,
    branch_strides,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    c = tl.arange(0, CHANNELS)
    channel_exists = c < channels
    scale = 1.0
    if weight is not None:
        scale = load_channels(weight, c, channel_exists)
    if layer_scale is not None:
        layer_scale = load_channels(layer_scale, c, channel_exists)
    if sums is not None:
        of_weight = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
        of_bias = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
        if branch is not None:
            of_scale = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(count, TOKENS), tl.num_programs(0)):
        t = tile * TOKENS + tl.arange(0, TOKENS)
        token_exists = t < count
        exists = token_exists[:, None] & channel_exists[None, :]
        mean = tl.load(means + t, mask=token_exists, other=0.0)[:, None]
        rstd = tl.load(rstds + t, mask=token_exists, other=0.0)[:, None]
        source = total + token_offsets(t, tokens, total_strides, UNIT) + c[None, :]
        hat = (tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean) * rstd
        source = grad + token_offsets(t, tokens, grad_strides, UNIT) + c[None, :]
        incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        if sums is not None:
            of_weight += incoming * hat
            of_bias += incoming
        scaled = incoming * scale
        product_mean = row_sum(scaled * hat, exists)[:, None] / channels
        outgoing = (scaled - row_sum(scaled, exists)[:, None] / channels - hat * product_mean) * rstd
        if total_grad is not None:
            source = total_grad + token_offsets(t, tokens, total_grad_strides, UNIT) + c[None, :]
            outgoing += tl.load(source, mask=exists, other=0.0).to(tl.float32)
        target = t.to(tl.int64)[:, None] * channels + c[None, :]
        if x_grad is not None:
            tl.store(x_grad + target, outgoing.to(x_grad.dtype.element_ty), mask=exists)
        if branch_grad is not None:
            outgoing_branch = outgoing * branch_factor(layer_scale, sample_scale, t, tokens, token_exists)
            tl.store(branch_grad + target, outgoing_branch.to(branch_grad.dtype.element_ty), mask=exists)
        if branch is not None:
            source = branch + token_offsets(t, tokens, branch_strides, UNIT) + c[None, :]
            added = tl.load(source, mask=exists, other=0.0).to(tl.float32)
            of_scale += outgoing * added * branch_factor(None, sample_scale, t, tokens, token_exists)
    if sums is not None:
        sums += tl.program_id(0).to(tl.int64) * 3 * channels + c
        tl.store(sums, tl.sum(of_weight, axis=0), mask=channel_exists)
        tl.store(sums + channels, tl.sum(of_bias, axis=0), mask=channel_exists)
        if branch is not None:
            tl.store(sums + 2 * channels, tl.sum(of_scale, axis=0), mask=channel_exists)


@triton.jit(do_not_specialize=["parts"])
def _add_token_sums_kernel(
    sums,  # (parts, 3, C)
    weight_grad,  # (C,), or None
    bias_grad,  # (C,), or None
    layer_scale_grad,  # (C,), or None
    parts,
    channels,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    for k in tl.static_range(3):
        result = weight_grad if k == 0 else bias_grad if k == 1 else layer_scale_grad
        if result is not None:
            added = tl.zeros((PARTS, CHANNELS), dtype=tl.float32)
            for start in range(0, parts, PARTS):
                part = start + tl.arange(0, PARTS)
                exists = (part < parts)[:, None] & (c < channels)[None, :]
                added += tl.load(sums + (part[:, None] * 3 + k) * channels + c[None, :], mask=exists, other=0.0)
            tl.store(result + c, tl.sum(added, axis=0).to(result.dtype.element_ty), mask=c < channels)


def backward(
    total_grad: Tensor | None,
    grad: Tensor,
    total: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    branch_dtype: torch.dtype,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Launch the backward kernels.

    Args:
        total_grad: gradient of the sum, (B, ..., C), or None for zeros.
        grad: gradient of what is normalised, (B, ..., C).
        total: the sum.
        branch: what was added, where the gradient of ``layer_scale`` is needed.
        weight, bias, layer_scale: (C,), or None.
        sample_scale: (B,), or None.
        means, rstds: of the tokens, as the forward pass returned them.
        branch_dtype: type of the branch's gradient.
        needed: which gradients are: of the sum, of the branch apart from it, of weight, bias and ``layer_scale``.

    Returns:
        The gradients that are needed, in that order.
    """
    x_grad = torch.empty(total.shape, dtype=total.dtype, device=total.device) if needed[0] else None
    branch_grad = torch.empty(total.shape, dtype=branch_dtype, device=total.device) if needed[1] else None
    small = [
        value.new_empty(value.shape) if value is not None and need else None
        for value, need in zip((weight, bias, layer_scale), needed[2:], strict=True)
    ]
    written = [value for value in small if value is not None]
    results = [*(value for value in (x_grad, branch_grad) if value is not None), *written]
    if total.numel() == 0:
        return [value.zero_() for value in results]
    given = [value if value is None else rows_of(value) for value in (total_grad, grad, total, branch)]
    rows = [value for value in given if value is not None]
    unit, (tokens, channels, threads) = unit_of(*rows), tile_of(total)
    count = means.numel()
    parts = min(MOST_PARTS, launching.cdiv(launching.cdiv(count, tokens), LEAST_TILES))
    sums = torch.empty((parts, 3, total.shape[-1]), dtype=torch.float32, device=total.device) if written else None
    with torch.cuda.device_of(total):
        launching.launch(
            _residual_layer_norm_bwd_kernel,
            (parts,),
            *(*given, *map(dense, (weight, layer_scale, sample_scale)), means, rstds, x_grad, branch_grad, sums),
            *(count, rows[0].shape[1], total.shape[-1] // unit),
            *(strides_of(rows[0] if value is None else value, unit) for value in given),
            TOKENS=tokens,
            CHANNELS=channels,
            UNIT=unit,
            num_warps=threads // WARP_SIZE,
        )
        if sums is not None:
            launching.launch(
                _add_token_sums_kernel,
                (launching.cdiv(total.shape[-1], CHANNELS_AT_ONCE),),
                *(sums, *small, parts, total.shape[-1]),
                PARTS=PARTS_AT_ONCE,
                CHANNELS=CHANNELS_AT_ONCE,
                num_warps=THREADS // WARP_SIZE,
            )
    return results
