"""Triton kernels of the depthwise multi-kernel convolution.

A first, small kernel merges all kernels and the identity into one of K x K taps, stored tap by tap in float32 with
channels innermost. After that there is one depthwise convolution; its gradient uses the merged kernel again.

A lane owns COLUMNS columns of one channel of one sample, and walks down their rows. It keeps all K x K taps in
registers, loads the COLUMNS + K - 1 pixels around its columns once for each row, while it works on the row before, and
adds each to the K output rows that it counts for; the sums move up by one with every row, and the first of them is
done. So three of four instructions are multiply-adds, and neither rows outside of the map nor idle lanes cost any. The
distance of pixels is compiled in, as addresses are then constants from one pointer for each row. Where there are few
lanes, each walks a part of the rows.

The gradient of the map is the same convolution with the taps in reverse order, that of the merged kernel has a file of
its own, and merged kernels wider than `WIDEST` have one. No atomics anywhere: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 C=72 H=64 W=64 K=7: 4.00 bytes per element, least 4.00; 8.8 us, floor 8.8 us; multiply-adds 15.4 us
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .depthwise_multi_kernel_wide import convolve_wide
from .lanes import (
    LANES,
    WIDEST,
    channels_innermost,
    lane_place,
    of_existing,
    pixels_around,
    row_line,
    shape_key,
    walk_of,
    zero_sums,
)
from .maps import THREADS, WARP_SIZE, strides_of

FORWARD_CHOICES = ({"columns": 4}, {"columns": 8})  # of a lane
MERGE_CHANNELS = 16


@triton.jit
def _taps(channels, K: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return this program's taps x channels of the merged kernel: taps (TAPS, 1), channels (1, CHANNELS), existence."""
    tap = tl.arange(0, TAPS)[:, None]
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return tap, c, (tap < K * K) & (c < channels)


@triton.jit
def part_offsets(tap, c, SIDE: tl.constexpr, K: tl.constexpr):
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
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tap, c, exists = _taps(channels, K, TAPS, CHANNELS)
    total = tl.zeros((TAPS, CHANNELS), dtype=tl.float32)
    if RESIDUAL:
        total += tl.where(tap == (K * K) // 2, 1.0, 0.0)
    for i in tl.static_range(len(SIDES)):
        offsets, inside = part_offsets(tap, c, SIDES[i], K)
        total += tl.load(weights[i] + offsets, mask=exists & inside, other=0.0).to(tl.float32)
    tl.store(merged + tap * channels + c, total, mask=exists)


@triton.jit
def _store_pixels(line, values, mask, column, width, STEP: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    for q in tl.static_range(COLUMNS):
        exists = mask if WHOLE else mask & (column + q < width)
        tl.store(line + q * STEP, values[q].to(line.dtype.element_ty), mask=exists)


@triton.jit
def _depthwise_multi_kernel_fwd_kernel(
    x,  # (B, C, H, W) by strides
    merged,  # (K * K, C) float32
    out,  # (B, C, H, W) by strides
    lanes,  # B * strips * C
    channels,
    height,
    width,
    strips,  # of columns
    parts,  # of the rows
    part_rows,
    x_strides,
    out_strides,
    X_STEP: tl.constexpr,  # distance of pixels
    OUT_STEP: tl.constexpr,
    FLIPPED: tl.constexpr,  # whether the kernel is turned by half a turn
    CHANNELS_INNERMOST: tl.constexpr,
    WHOLE: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    AROUND: tl.constexpr = K // 2
    exists, c, strip, sample = lane_place(lanes, channels, strips, parts, CHANNELS_INNERMOST, LANES)
    column = strip * COLUMNS
    first_row = tl.program_id(0) % parts * part_rows
    end_row = tl.minimum(first_row + part_rows, height)
    start, end = tl.maximum(first_row - AROUND, 0), tl.minimum(end_row + AROUND, height)  # of the rows that are read
    first_tap, step = merged + c, channels
    if FLIPPED:
        first_tap, step = first_tap + (K * K - 1) * channels, -channels
    taps = ()
    for tap in tl.static_range(K * K):
        taps = taps + (tl.load(first_tap + tap * step),)
    line = row_line(x, sample, c, start, column, x_strides, X_STEP)
    out_line = row_line(out, sample, c, start - AROUND, column, out_strides, OUT_STEP)
    pixels = of_existing(exists, pixels_around(line, None, column, width, X_STEP, AROUND, COLUMNS, WHOLE))
    zeros = zero_sums(COLUMNS, LANES)
    sums = zero_sums((K - 1) * COLUMNS, LANES)  # of the output rows that are not done, from the top
    for row in range(start, end):
        line += tl.where(row + 1 < end, x_strides[2], 0)
        following = pixels_around(line, None, column, width, X_STEP, AROUND, COLUMNS, WHOLE)
        sums = sums + zeros
        updated = ()
        for i in tl.static_range(K):
            for q in tl.static_range(COLUMNS):
                total = sums[i * COLUMNS + q]
                for j in tl.static_range(K):
                    total += pixels[q + j] * taps[(K - 1 - i) * K + j]
                updated = updated + (total,)
        if row - AROUND >= first_row:
            _store_pixels(out_line, updated, exists, column, width, OUT_STEP, COLUMNS, WHOLE)
        out_line += out_strides[2]
        sums, pixels = updated[COLUMNS:], following
    for k in tl.static_range(AROUND):  # what rows below the map would only add zeros to
        out_row = end - AROUND + k
        if (out_row >= first_row) & (out_row < end_row):
            _store_pixels(out_line, sums[k * COLUMNS :], exists, column, width, OUT_STEP, COLUMNS, WHOLE)
        out_line += out_strides[2]


def merge(weights: Sequence[Tensor], residual: bool) -> Tensor:
    """Launch the sum of all kernels and the identity, (K * K, C) in float32."""
    sides = tuple(weight.shape[-1] for weight in weights)
    side, channels = max(sides), weights[0].shape[0]
    merged = torch.empty((side * side, channels), dtype=torch.float32, device=weights[0].device)
    if channels:
        with torch.cuda.device_of(merged):
            launching.launch(
                _merge_kernel,
                (launching.cdiv(channels, MERGE_CHANNELS),),
                tuple(weight.contiguous() for weight in weights),
                merged,
                channels,
                SIDES=sides,
                K=side,
                RESIDUAL=residual,
                TAPS=launching.next_power_of_2(side * side),
                CHANNELS=MERGE_CHANNELS,
                num_warps=THREADS // WARP_SIZE,
            )
    return merged


@tuning.tunable(FORWARD_CHOICES, shape_key)
def convolve(
    choice: tuning.Choice, x: Tensor, merged: Tensor, memory_format: torch.memory_format, *, flipped: bool
) -> Tensor:
    """Launch the convolution of a map (B, C, H, W), or, flipped, of the incoming gradient into the map's."""
    out = torch.empty_like(x, memory_format=memory_format)
    if out.numel() == 0:
        return out
    side = math.isqrt(merged.shape[0])
    with torch.cuda.device_of(x):
        if side > WIDEST:
            convolve_wide(x, merged, out, side, flipped)
            return out
        walk = walk_of(x, choice["columns"])
        launching.launch(
            _depthwise_multi_kernel_fwd_kernel,
            (launching.cdiv(walk.lanes, LANES) * walk.parts,),
            x,
            merged,
            out,
            *(walk.lanes, *x.shape[1:], walk.strips, walk.parts, walk.part_rows),
            strides_of(x),
            strides_of(out),
            X_STEP=x.stride(3),
            OUT_STEP=out.stride(3),
            FLIPPED=flipped,
            CHANNELS_INNERMOST=channels_innermost(x),
            WHOLE=x.shape[3] % choice["columns"] == 0,
            K=side,
            COLUMNS=choice["columns"],
            LANES=LANES,
            num_warps=LANES // WARP_SIZE,
        )
    return out
