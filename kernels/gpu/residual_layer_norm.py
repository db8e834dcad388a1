"""Triton kernels of the residual sum and its layer norm, forward: one launch that reads and writes every token once.

A program holds whole tokens, at least TILE elements of them, in its registers; it takes one such tile after the other,
so that weights and factors are read once for many tokens. Tokens are taken with the strides they have, which lets them
be views that leave out leading tokens (the class token) without a copy. Strides, and the channels themselves, are
counted in units of up to 8 channels, by which a compiler sees that 72 channels can be moved 16 bytes at once.

The sum is rounded to its own type before it is normalised: the statistics are those of what is written. They are in
float32, the mean first, then the squares of what differs from it. No atomics: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 M=1025 C=768: 8.00 bytes per element, least 8.00; 46.9 us, floor 46.9 us
* forward, nothing added, B=32 M=1025 C=768: 4.00 bytes per element, least 4.00; 23.4 us, floor 23.4 us
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifuse.kernels.errors import BackendError

from . import launching
from .maps import THREADS, WARP_SIZE

TILE = 1024  # elements that a program works on at once, if a token has no more
ELEMENTS_PER_THREAD = 8
MOST_THREADS = 512
MOST_CHANNELS = 1 << 14  # a program holds them all
MOST_UNIT = 8
MOST_PROGRAMS = 4096  # each then takes several tiles


@triton.jit
def token_offsets(t, tokens, strides, UNIT: tl.constexpr):
    """Return where tokens begin in (B, M, C), by their number over all samples."""
    return ((t // tokens).to(tl.int64) * strides[0] + (t % tokens).to(tl.int64) * strides[1])[:, None] * UNIT


@triton.jit
def load_channels(values, c, exists):
    """Return one number for each channel, in float32."""
    return tl.load(values + c, mask=exists, other=0.0).to(tl.float32)[None, :]


@triton.jit
def row_sum(products, exists):
    """Add up products over the channels of each token; what lies outside counts nothing.

    The choice between a product and zero keeps the compiler from fusing a product with the first addition: threads that
    add two products crosswise would each round the other's alone, and so disagree in the last bit of one sum.
    """
    return tl.sum(tl.where(exists, products, 0.0), axis=1)


@triton.jit
def branch_factor(layer_scale, sample_scale, t, tokens, token_exists):
    """Return what a branch is multiplied by, (tokens, channels) or less of it: a row, a column or 1, in float32."""
    factor = 1.0
    if layer_scale is not None:
        factor = layer_scale
    if sample_scale is not None:
        factor *= tl.load(sample_scale + t // tokens, mask=token_exists, other=0.0).to(tl.float32)[:, None]
    return factor


@triton.jit
def _residual_layer_norm_fwd_kernel(
    x,  # (B, M, C)
    branch,  # (B, M, C), or None
    weight,  # (C,), or None
    bias,  # (C,), or None
    layer_scale,  # (C,), or None
    sample_scale,  # (B,), or None
    total,  # (B * M, C); not touched without a branch
    normalised,  # (B * M, C)
    means,  # (B * M,)
    rstds,  # (B * M,)
    count,  # B * M
    tokens,  # M
    channel_units,
    eps,
    x_strides,  # of samples and tokens, in units
    branch_strides,
    TOKENS: tl.constexpr,  # of a tile
    CHANNELS: tl.constexpr,  # at least C
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    c = tl.arange(0, CHANNELS)
    channel_exists = c < channels
    scale, shift = 1.0, 0.0
    if weight is not None:
        scale = load_channels(weight, c, channel_exists)
    if bias is not None:
        shift = load_channels(bias, c, channel_exists)
    if layer_scale is not None:
        layer_scale = load_channels(layer_scale, c, channel_exists)
    for tile in range(tl.program_id(0), tl.cdiv(count, TOKENS), tl.num_programs(0)):
        t = tile * TOKENS + tl.arange(0, TOKENS)
        token_exists = t < count
        exists = token_exists[:, None] & channel_exists[None, :]
        source = x + token_offsets(t, tokens, x_strides, UNIT) + c[None, :]
        values = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        target = t.to(tl.int64)[:, None] * channels + c[None, :]
        if branch is not None:
            source = branch + token_offsets(t, tokens, branch_strides, UNIT) + c[None, :]
            added = tl.load(source, mask=exists, other=0.0).to(tl.float32)
            rounded = values + added * branch_factor(layer_scale, sample_scale, t, tokens, token_exists)
            rounded = rounded.to(total.dtype.element_ty)
            tl.store(total + target, rounded, mask=exists)
            values = rounded.to(tl.float32)
        mean = tl.sum(values, axis=1) / channels
        centred = values - mean[:, None]
        rstd = tl.rsqrt(row_sum(centred * centred, exists) / channels + eps)
        tl.store(means + t, mean, mask=token_exists)
        tl.store(rstds + t, rstd, mask=token_exists)
        result = centred * rstd[:, None] * scale + shift
        tl.store(normalised + target, result.to(normalised.dtype.element_ty), mask=exists)


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel on tokens of shape (B, ..., C).

    Returns:
        The sum normalised, in the type ``dtype``; the sum, without elements where there is no branch; and what backward
        needs: the means (B, ...), and the reciprocals of the deviations, in float32.
    """
    normalised = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(0 if branch is None else x.shape, dtype=x.dtype, device=x.device)
    means, rstds = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return normalised, total, means.zero_(), rstds.zero_()
    given = [rows_of(value) for value in (x, branch) if value is not None]
    unit, (tokens, channels, threads) = unit_of(*given), tile_of(x)
    count = means.numel()
    with torch.cuda.device_of(x):
        launching.launch(
            _residual_layer_norm_fwd_kernel,
            (min(MOST_PROGRAMS, launching.cdiv(count, tokens)),),
            *(given[0], None if branch is None else given[1]),
            *map(dense, (weight, bias, layer_scale, sample_scale)),
            *(total, normalised, means, rstds, count, given[0].shape[1], x.shape[-1] // unit, eps),
            *(strides_of(given[0], unit), strides_of(given[-1], unit)),
            TOKENS=tokens,
            CHANNELS=channels,
            UNIT=unit,
            num_warps=threads // WARP_SIZE,
        )
    return normalised, total, means, rstds


def dense(values: Tensor | None) -> Tensor | None:
    """Return values of channels or samples without gaps in memory."""
    return values if values is None else values.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """Return (B, ..., C) as (B, M, C) whose channels lie side by side: a view where there is one, or else a copy."""
    rows = x if x.ndim == 3 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


def strides_of(rows: Tensor, unit: int) -> tuple[int, int]:
    """Return the strides of samples and tokens of (B, M, C), in units."""
    return rows.stride(0) // unit, rows.stride(1) // unit


def unit_of(*rows: Tensor) -> int:
    """Return the most channels, up to 8, by whose multiples samples and tokens lie apart in each of (B, M, C)."""
    return math.gcd(MOST_UNIT, rows[0].shape[2], *(stride for r in rows for stride in (r.stride(0), r.stride(1))))


def tile_of(x: Tensor) -> tuple[int, int, int]:
    """Return the tokens and channels of a tile of (B, ..., C), and the threads that hold it."""
    if x.shape[-1] > MOST_CHANNELS:
        raise BackendError(
            f"tokens of {x.shape[-1]} channels are wider than the {MOST_CHANNELS} that the kernels hold; use fewer, "
            f"{launching.OTHERWISE}"
        )
    channels = launching.next_power_of_2(x.shape[-1])
    threads = min(MOST_THREADS, max(THREADS, channels // ELEMENTS_PER_THREAD))
    return max(1, TILE // channels), channels, threads
