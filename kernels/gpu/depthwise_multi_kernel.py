"""Triton kernels of the depthwise multi-kernel convolution.

A first, small kernel merges all kernels and the identity into one of K x K taps, stored tap by tap in float32 with
channels innermost. After that there is one depthwise convolution.

A tile is ROWS rows of PIXELS columns and CHANNELS channels. Its taps are visited by kernel column: for each, the
ROWS + K - 1 rows of the map under the tile are loaded once and serve up to K kernel rows each, from accumulators and
weights in registers. The loop over kernel columns is not unrolled, which keeps the loads, and so the registers, few.
The kernels take any strides; where channels are innermost, UNIT, a common divisor of the channels and of the other
strides, tells the compiler that 16 bytes can be loaded at once.

The gradient of the map is the same convolution with the taps in reverse order. For the gradient of the merged kernel
a program owns one kernel column and one block of channels, visits a fixed share of the tiles, and writes K sums per
channel; a last kernel adds up the shares in a fixed order and writes each part's centre of the merged gradient. No
atomics: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 C=72 H=64 W=64 K=7: 4.00 bytes per element, least 4.00; 8.8 us, floor 8.8 us; multiply-adds 15.4 us
* backward, B=32 C=72 H=64 W=64 K=7: 8.19 bytes per element, least 6.00; 18.0 us, floor 13.2 us; multiply-adds 30.8 us
Multiply-adds bind, not memory. Backward reads the gradient in two launches, as only that of the kernels needs sums over
the map, whose shares are written and read once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .maps import THREADS, WARP_SIZE, strides_of, unit_of

FORWARD_CHOICES = ({"rows": 4}, {"rows": 8})  # of a tile; only 16-byte loads of a 2-byte type leave registers for 8
BACKWARD_CHOICES = ({"rows": 4}, {"rows": 2})  # of the kernels' gradient
TILE = 1024  # columns times channels of a tile: 8 values per thread and row
LEAST_CHANNELS = 16
MAX_SHARES = 64  # of the tiles, in the kernels' gradient; fixed, so that the order of summation is the same everywhere
MERGE_CHANNELS = 16


@triton.jit
def _taps(channels, K: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return this program's taps x channels of the merged kernel: taps (TAPS, 1), channels (1, CHANNELS), existence."""
    tap = tl.arange(0, TAPS)[:, None]
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return tap, c, (tap < K * K) & (c < channels)


@triton.jit
def _part_offsets(tap, c, SIDE: tl.constexpr, K: tl.constexpr):
    """Return where taps of the merged kernel lie in a part (C, SIDE, SIDE), and which of them lie in it at all."""
    row, column = tap // K - (K - SIDE) // 2, tap % K - (K - SIDE) // 2
    inside = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
    return c.to(tl.int64) * (SIDE * SIDE) + row * SIDE + column, inside


@triton.jit
def _merge_kernel(
    weights,  # N pointers to (C, SIDES[i], SIDES[i]), contiguous
    merged,  # (K * K, C) float32
    channels,
    SIDES: tl.constexpr,
    K: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FLIPPED: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tap, c, exists = _taps(channels, K, TAPS, CHANNELS)
    total = tl.zeros((TAPS, CHANNELS), dtype=tl.float32)
    if RESIDUAL:
        total += tl.where(tap == (K * K) // 2, 1.0, 0.0)
    for i in tl.static_range(len(SIDES)):
        offsets, inside = _part_offsets(tap, c, SIDES[i], K)
        total += tl.load(weights[i] + offsets, mask=exists & inside, other=0.0).to(tl.float32)
    place = K * K - 1 - tap if FLIPPED else tap
    tl.store(merged + place * channels + c, total, mask=exists)


@triton.jit
def _tile_place(tile, height, width, ROWS: tl.constexpr, PIXELS: tl.constexpr):
    """Return the sample of a tile, its first row and its first column."""
    across, down = tl.cdiv(width, PIXELS), tl.cdiv(height, ROWS)
    return (tile // (across * down)).to(tl.int64), (tile // across) % down * ROWS, tile % across * PIXELS


@triton.jit
def _load_row(x, sample, row, columns, c, height, width, channels, strides, UNIT: tl.constexpr):
    """Load columns x channels of one row of a sample, zeros outside the map, in float32."""
    exists = ((columns >= 0) & (columns < width) & (row >= 0) & (row < height))[:, None] & (c < channels)[None, :]
    offsets = _row_offsets(sample, row, columns, c, strides, UNIT)
    return tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _row_offsets(sample, row, columns, c, strides, UNIT: tl.constexpr):
    start = sample * (strides[0] * UNIT) + row.to(tl.int64) * (strides[2] * UNIT)
    across = start + columns.to(tl.int64) * (strides[3] * UNIT)
    return across[:, None] + (c.to(tl.int64) * strides[1])[None, :]


@triton.jit
def _depthwise_multi_kernel_fwd_kernel(
    x,  # (B, C, H, W) by strides
    merged,  # (K * K, C) float32
    out,  # (B, C, H, W) by strides
    channel_units,
    height,
    width,
    x_strides,
    out_strides,
    UNIT: tl.constexpr,  # what the channels and all strides but the channels' are counted in
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = channel_units * UNIT
    blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    sample, first_row, first_column = _tile_place(tl.program_id(0) // blocks, height, width, ROWS, PIXELS)
    columns = first_column + tl.arange(0, PIXELS)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((PIXELS, CHANNELS), dtype=tl.float32),)
    for j in range(K):
        taps = ()
        for i in tl.static_range(K):
            taps = taps + (tl.load(merged + (i * K + j) * channels + c, mask=c < channels, other=0.0),)
        for above in tl.static_range(ROWS + K - 1):
            row, shifted = first_row + above - K // 2, columns + j - K // 2
            values = _load_row(x, sample, row, shifted, c, height, width, channels, x_strides, UNIT)
            updated = ()
            for r in tl.static_range(ROWS):
                if above - r >= 0 and above - r < K:
                    updated = updated + (sums[r] + values * taps[above - r][None, :],)
                else:
                    updated = updated + (sums[r],)
            sums = updated
    exists = (columns < width)[:, None] & (c < channels)[None, :]
    for r in tl.static_range(ROWS):
        offsets = _row_offsets(sample, first_row + r, columns, c, out_strides, UNIT)
        tl.store(out + offsets, sums[r].to(out.dtype.element_ty), mask=exists & (first_row + r < height))


@triton.jit
def _depthwise_multi_kernel_dw_kernel(
    grad,  # (B, C, H, W) by strides
    x,  # (B, C, H, W) by strides
    shares,  # (programs' shares, K * K, C) float32
    channel_units,
    height,
    width,
    tiles,
    share_count,
    grad_strides,
    x_strides,
    UNIT: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = channel_units * UNIT
    blocks = tl.cdiv(channels, CHANNELS)
    j = tl.program_id(0) % K  # neighbours read the same tiles
    c = tl.program_id(0) // K % blocks * CHANNELS + tl.arange(0, CHANNELS)
    share = tl.program_id(0) // (K * blocks)
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros((PIXELS, CHANNELS), dtype=tl.float32),)
    for tile in range(share, tiles, share_count):
        sample, first_row, first_column = _tile_place(tile, height, width, ROWS, PIXELS)
        columns = first_column + tl.arange(0, PIXELS)
        incoming = ()
        for r in tl.static_range(ROWS):
            row = _load_row(grad, sample, first_row + r, columns, c, height, width, channels, grad_strides, UNIT)
            incoming = incoming + (row,)
        for above in tl.static_range(ROWS + K - 1):
            row, shifted = first_row + above - K // 2, columns + j - K // 2
            values = _load_row(x, sample, row, shifted, c, height, width, channels, x_strides, UNIT)
            updated = ()
            for i in tl.static_range(K):
                if above - i >= 0 and above - i < ROWS:
                    updated = updated + (sums[i] + values * incoming[above - i],)
                else:
                    updated = updated + (sums[i],)
            sums = updated
    for i in tl.static_range(K):
        place = (share.to(tl.int64) * (K * K) + i * K + j) * channels + c
        tl.store(shares + place, tl.sum(sums[i], axis=0), mask=c < channels)


@triton.jit
def _depthwise_multi_kernel_split_kernel(
    shares,  # (share_count, K * K, C) float32
    weight_grads,  # N pointers to (C, SIDES[i], SIDES[i]), contiguous, None where no gradient is asked for
    channels,
    share_count,
    SIDES: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tap, c, exists = _taps(channels, K, TAPS, CHANNELS)
    total = tl.zeros((TAPS, CHANNELS), dtype=tl.float32)
    for share in range(share_count):
        place = (tl.cast(share, tl.int64) * (K * K) + tap) * channels + c
        total += tl.load(shares + place, mask=exists, other=0.0)
    for i in tl.static_range(len(SIDES)):
        if weight_grads[i] is not None:
            offsets, inside = _part_offsets(tap, c, SIDES[i], K)
            tl.store(weight_grads[i] + offsets, total.to(weight_grads[i].dtype.element_ty), mask=exists & inside)


def _key(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> tuning.Key:
    return tuning.key_of(x, unit_of(x), weights[-1].shape[-1])


@tuning.tunable(FORWARD_CHOICES, _key, lambda choice, x, *_, **__: choice["rows"] < 8 or unit_of(x) == 8)
def convolve(
    choice: tuning.Choice, x: Tensor, weights: Sequence[Tensor], residual: bool, memory_format: torch.memory_format,
    *, flipped: bool,
) -> Tensor:  # fmt: skip
    """Launch the convolution of a map (B, C, H, W), or, flipped, of the incoming gradient into the map's."""
    out = torch.empty_like(x, memory_format=memory_format)
    if out.numel() == 0:
        return out
    _, channels, height, width = x.shape
    sides = tuple(weight.shape[-1] for weight in weights)
    side, tile = max(sides), _tile(width, choice["rows"])
    unit = unit_of(x, out)
    with torch.cuda.device_of(x):
        merged = torch.empty((side * side, channels), dtype=torch.float32, device=x.device)
        launching.launch(
            _merge_kernel,
            (launching.cdiv(channels, MERGE_CHANNELS),),
            tuple(weight.contiguous() for weight in weights),
            merged,
            channels,
            SIDES=sides,
            K=side,
            RESIDUAL=residual,
            FLIPPED=flipped,
            TAPS=launching.next_power_of_2(side * side),
            CHANNELS=MERGE_CHANNELS,
            num_warps=THREADS // WARP_SIZE,
        )
        launching.launch(
            _depthwise_multi_kernel_fwd_kernel,
            (_tiles(x, tile) * launching.cdiv(channels, tile["CHANNELS"]),),
            x,
            merged,
            out,
            *(channels // unit, height, width),
            strides_of(x, unit),
            strides_of(out, unit),
            UNIT=unit,
            K=side,
            **tile,
            num_warps=THREADS // WARP_SIZE,
        )
    return out


@tuning.tunable(BACKWARD_CHOICES, lambda grad, *rest: _key(*rest))
def weight_gradients(
    choice: tuning.Choice, grad: Tensor, x: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    """Launch the gradients of those kernels that need one."""
    grads = [
        torch.empty(w.shape, dtype=w.dtype, device=w.device) if n else None
        for w, n in zip(weights, needed, strict=True)
    ]
    asked = [weight_grad for weight_grad in grads if weight_grad is not None]
    if grad.numel() == 0:
        return [weight_grad.zero_() for weight_grad in asked]
    _, channels, height, width = x.shape
    sides = tuple(weight.shape[-1] for weight in weights)
    side, tile = max(sides), _tile(width, choice["rows"])
    tiles, unit = _tiles(x, tile), unit_of(grad, x)
    share_count = min(tiles, MAX_SHARES)
    with torch.cuda.device_of(grad):
        shares = torch.empty((share_count, side * side, channels), dtype=torch.float32, device=grad.device)
        launching.launch(
            _depthwise_multi_kernel_dw_kernel,
            (share_count * side * launching.cdiv(channels, tile["CHANNELS"]),),
            grad,
            x,
            shares,
            *(channels // unit, height, width),
            *(tiles, share_count),
            strides_of(grad, unit),
            strides_of(x, unit),
            UNIT=unit,
            K=side,
            **tile,
            num_warps=THREADS // WARP_SIZE,
        )
        launching.launch(
            _depthwise_multi_kernel_split_kernel,
            (launching.cdiv(channels, MERGE_CHANNELS),),
            shares,
            tuple(grads),
            channels,
            share_count,
            SIDES=sides,
            K=side,
            TAPS=launching.next_power_of_2(side * side),
            CHANNELS=MERGE_CHANNELS,
            num_warps=THREADS // WARP_SIZE,
        )
    return asked


def _tile(width: int, rows: int) -> dict[str, int]:
    """Return the size of a tile: no wider than the map needs, and the more channels the narrower."""
    pixels = min(launching.next_power_of_2(width), TILE // LEAST_CHANNELS)
    return {"ROWS": rows, "PIXELS": pixels, "CHANNELS": TILE // pixels}


def _tiles(x: Tensor, tile: dict[str, int]) -> int:
    batch, _, height, width = x.shape
    return batch * launching.cdiv(height, tile["ROWS"]) * launching.cdiv(width, tile["PIXELS"])
