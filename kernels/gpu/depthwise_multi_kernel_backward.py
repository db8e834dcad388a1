"""Triton kernels of the gradient of the depthwise multi-kernel convolution's kernels.

A lane walks as in the forward pass, see `depthwise_multi_kernel`. It keeps the K x K sums of the merged kernel's
gradient over the rows that it walks, and K rows of the incoming gradient, ROWS of whose K + ROWS - 1 are new in each
step, and writes its sums as a share. A last kernel adds up the shares in a fixed order and writes each part's centre of
the merged gradient.

The gradient of the map is a forward pass over the incoming gradient, and counts here: three launches in all.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* backward, B=32 C=72 H=64 W=64 K=7: 9.53 bytes per element, least 6.00; 20.9 us, floor 13.2 us; multiply-adds 30.8 us
Multiply-adds bind, not memory. The gradient is read in two launches, and the shares are written and read once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .depthwise_multi_kernel import part_offsets
from .depthwise_multi_kernel_wide import wide_shares
from .lanes import (
    LANES,
    WIDEST,
    channels_innermost,
    lane_place,
    new_shares,
    of_existing,
    pixels_around,
    row_line,
    samples_of,
    shape_key,
    walk_of,
    zero_sums,
)
from .maps import THREADS, WARP_SIZE, strides_of

BACKWARD_CHOICES = ({"columns": 4}, {"columns": 2})  # of a lane, in the kernels' gradient
ROWS_AT_ONCE = 4  # of the walk, where it divides the rows
ROWS_AT_ONCE_RAGGED = 2  # where the last strip of columns is not full: conditions take registers, too
SUMMED = 2048  # elements of a tile of the shares
FEW_ENTRIES, MANY_ENTRIES = 32, 128  # of a share in a tile: more programs, or fewer that have less beside to do
ENOUGH_ENTRIES = 1 << 14


@triton.jit
def _depthwise_multi_kernel_dw_kernel(
    grad,  # (B, C, H, W) by strides
    x,  # (B, C, H, W) by strides
    shares,  # (shares, K * K, C) float32 by strides
    lanes,  # groups of samples * strips * C
    channels,
    height,
    width,
    strips,
    parts,
    part_rows,
    samples,  # of a group
    grad_strides,
    x_strides,
    share_stride,
    entry_stride,
    GRAD_STEP: tl.constexpr,
    X_STEP: tl.constexpr,
    CHANNELS_INNERMOST: tl.constexpr,
    WHOLE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # at once; a divisor of the rows of all parts
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    AROUND: tl.constexpr = K // 2
    exists, c, strip, group = lane_place(lanes, channels, strips, parts, CHANNELS_INNERMOST, LANES)
    column = strip * COLUMNS
    part = tl.program_id(0) % parts
    first_row = part * part_rows
    end_row = tl.minimum(first_row + part_rows, height)
    sums = zero_sums(K * K, LANES)
    for number in range(samples):
        sample = group * samples + number
        line = row_line(x, sample, c, first_row, column, x_strides, X_STEP)
        grad_line = row_line(grad, sample, c, first_row - AROUND, column, grad_strides, GRAD_STEP)
        window = ()  # of the gradient: the rows around that of the map, but for the last
        for i in tl.static_range(2 * AROUND):
            at = first_row + (i - AROUND)
            window = window + pixels_around(
                grad_line, (at >= 0) & (at < height), column, width, GRAD_STEP, 0, COLUMNS, WHOLE
            )
            grad_line += grad_strides[2]
        window = of_existing(exists, window)
        incoming = pixels_around(grad_line, first_row + AROUND < height, column, width, GRAD_STEP, 0, COLUMNS, WHOLE)
        incoming = of_existing(exists, incoming)
        pixels = of_existing(exists, pixels_around(line, None, column, width, X_STEP, AROUND, COLUMNS, WHOLE))
        for row in range(first_row, end_row, ROWS):
            for r in tl.static_range(ROWS):
                line += tl.where(row + (r + 1) < height, x_strides[2], 0)
                grad_line += grad_strides[2]
                following = pixels_around(line, None, column, width, X_STEP, AROUND, COLUMNS, WHOLE)
                there = row + (r + 1 + AROUND) < height
                last = pixels_around(grad_line, there, column, width, GRAD_STEP, 0, COLUMNS, WHOLE)
                window = window + incoming
                updated = ()
                for i in tl.static_range(K):
                    for j in tl.static_range(K):
                        total = sums[i * K + j]
                        for q in tl.static_range(COLUMNS):
                            total += window[(K - 1 - i) * COLUMNS + q] * pixels[q + j]
                        updated = updated + (total,)
                sums, window = updated, window[COLUMNS:]
                pixels, incoming = following, last
    share = ((group * strips + strip) * parts + part) * share_stride
    for tap in tl.static_range(K * K):
        entry = (tap * channels + c).to(tl.int64) * entry_stride
        tl.store(shares + share + entry, sums[tap], mask=exists)


@triton.jit
def _depthwise_multi_kernel_split_kernel(
    shares,  # (share_count, K * K, C) float32 by strides
    weight_grads,  # N pointers to (C, SIDES[i], SIDES[i]), contiguous, None where no gradient is asked for
    channels,
    share_count,
    share_stride,
    entry_stride,
    SIDES: tl.constexpr,
    K: tl.constexpr,
    SHARES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    exists = entry < K * K * channels
    share = tl.arange(0, SHARES)
    places = shares + share.to(tl.int64)[:, None] * share_stride + entry.to(tl.int64)[None, :] * entry_stride
    total = tl.zeros((SHARES, ENTRIES), dtype=tl.float32)
    for first in range(0, share_count, SHARES):
        total += tl.load(places, mask=(first + share < share_count)[:, None] & exists[None, :], other=0.0)
        places += tl.cast(share_stride, tl.int64) * SHARES
    merged = tl.sum(total, axis=0)
    for i in tl.static_range(len(SIDES)):
        if weight_grads[i] is not None:
            offsets, inside = part_offsets(entry // channels, entry % channels, SIDES[i], K)
            tl.store(weight_grads[i] + offsets, merged.to(weight_grads[i].dtype.element_ty), mask=exists & inside)


@tuning.tunable(BACKWARD_CHOICES, lambda grad, *rest: shape_key(*rest))
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
    sides = tuple(weight.shape[-1] for weight in weights)
    side, channels = max(sides), x.shape[1]
    total = side * side * channels
    entries = MANY_ENTRIES if total >= ENOUGH_ENTRIES else FEW_ENTRIES
    with torch.cuda.device_of(grad):
        shares = wide_shares(grad, x, side) if side > WIDEST else _shares(grad, x, side, choice["columns"])
        launching.launch(
            _depthwise_multi_kernel_split_kernel,
            (launching.cdiv(total, entries),),
            shares,
            tuple(grads),
            channels,
            shares.shape[0],
            shares.stride(0),
            shares.stride(2),
            SIDES=sides,
            K=side,
            SHARES=SUMMED // entries,
            ENTRIES=entries,
            num_warps=THREADS // WARP_SIZE,
        )
    return asked


def _shares(grad: Tensor, x: Tensor, side: int, columns: int) -> Tensor:
    """Launch the gradient of the merged kernel in shares (shares, K * K, C)."""
    batch, channels, height, width = x.shape
    whole = width % columns == 0
    rows_at_once = math.gcd(height, ROWS_AT_ONCE if whole else ROWS_AT_ONCE_RAGGED)
    walk = walk_of(x, columns, rows_at_once)
    samples = samples_of(x, walk.lanes)
    lanes = walk.lanes // samples
    shares = new_shares(x, batch // samples * walk.strips * walk.parts, side)
    launching.launch(
        _depthwise_multi_kernel_dw_kernel,
        (launching.cdiv(lanes, LANES) * walk.parts,),
        grad,
        x,
        shares,
        *(lanes, channels, height, width, walk.strips, walk.parts, walk.part_rows, samples),
        strides_of(grad),
        strides_of(x),
        *(shares.stride(0), shares.stride(2)),
        GRAD_STEP=grad.stride(3),
        X_STEP=x.stride(3),
        CHANNELS_INNERMOST=channels_innermost(x),
        WHOLE=whole,
        K=side,
        ROWS=rows_at_once,
        COLUMNS=columns,
        LANES=LANES,
        num_warps=LANES // WARP_SIZE,
    )
    return shares
