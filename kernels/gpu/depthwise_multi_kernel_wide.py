"""Triton kernels of the depthwise multi-kernel convolution where the merged kernel is wider than registers hold.

A lane owns COLUMNS columns of one channel, as in `depthwise_multi_kernel`. In the convolution it owns them in one row,
and takes up the merged kernel row by row, TAPS taps at a time, whose pixels it loads once. In the gradient of the
merged kernel a program owns TAPS taps of one row, whose sums its lanes keep while they walk down the rows, and writes
them as shares. The number of taps is no constant, so that one compilation serves all kernels.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 C=72 H=64 W=64 K=13: 4.00 bytes per element, least 4.00; 8.8 us, floor 8.8 us; multiply-adds 53.2 us
* backward, B=32 C=72 H=64 W=64 K=13: 8.33 bytes per element, least 6.00; 18.3 us, floor 13.2 us; multiply-adds 106.3 us
Multiply-adds bind, not memory, and each pair of them takes a load or so beside.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .lanes import LANES, channels_innermost, lane_place, new_shares, row_line, samples_of, zero_sums
from .maps import WARP_SIZE, strides_of

COLUMNS, TAPS = 4, 8


@triton.jit
def _pixels(line, column, width, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Load COUNT pixels of a row from each lane's column on, in float32; zeros outside the map."""
    found = ()
    for i in tl.static_range(COUNT):
        inside = (column + i >= 0) & (column + i < width)
        found = found + (tl.load(line + i * STEP, mask=inside, other=0.0).to(tl.float32),)
    return found


@triton.jit
def _add_taps(sums, line, column, width, tap, tap_stride, STEP: tl.constexpr, TAPS: tl.constexpr):
    """Add what TAPS taps beside one another make of the pixels from each lane's column on."""
    pixels = _pixels(line, column, width, STEP, len(sums) + TAPS - 1)
    for t in tl.static_range(TAPS):
        weight = tl.load(tap + t * tap_stride)
        updated = ()
        for q in tl.static_range(len(sums)):
            updated = updated + (sums[q] + pixels[q + t] * weight,)
        sums = updated
    return sums


@triton.jit
def _wide_convolution_kernel(
    x,  # (B, C, H, W) by strides
    merged,  # (side * side, C) float32
    out,  # (B, C, H, W) by strides
    lanes,  # B * strips * C
    channels,
    height,
    width,
    strips,  # of columns
    side,
    x_strides,
    out_strides,
    X_STEP: tl.constexpr,  # distance of pixels
    OUT_STEP: tl.constexpr,
    FLIPPED: tl.constexpr,  # whether the kernel is turned by half a turn
    CHANNELS_INNERMOST: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    LANES: tl.constexpr,
):
    exists, c, strip, sample = lane_place(lanes, channels, strips, height, CHANNELS_INNERMOST, LANES)
    row, column, around = tl.program_id(0) % height, strip * COLUMNS, side // 2
    sums = zero_sums(COLUMNS, LANES)
    for i in range(tl.maximum(around - row, 0), tl.minimum(side, height + around - row)):
        line = row_line(x, sample, c, row + i - around, column - around, x_strides, X_STEP)
        tap, tap_stride = merged + i * side * channels + c, channels
        if FLIPPED:
            tap, tap_stride = merged + (side - i) * side * channels - channels + c, -channels
        for first in range(0, side - side % TAPS, TAPS):
            place, at = line + tl.cast(first, tl.int64) * X_STEP, column - around + first
            sums = _add_taps(sums, place, at, width, tap + first * tap_stride, tap_stride, X_STEP, TAPS)
        for first in range(side - side % TAPS, side):
            place, at = line + tl.cast(first, tl.int64) * X_STEP, column - around + first
            sums = _add_taps(sums, place, at, width, tap + first * tap_stride, tap_stride, X_STEP, 1)
    out_line = row_line(out, sample, c, row, column, out_strides, OUT_STEP)
    for q in tl.static_range(COLUMNS):
        tl.store(out_line + q * OUT_STEP, sums[q].to(out.dtype.element_ty), mask=exists & (column + q < width))


@triton.jit
def _wide_gradient_kernel(
    grad,  # (B, C, H, W) by strides
    x,  # (B, C, H, W) by strides
    shares,  # (shares, side * side, C) float32 by strides
    lanes,  # groups of samples * strips * C
    channels,
    height,
    width,
    strips,
    side,
    samples,  # of a group
    grad_strides,
    x_strides,
    share_stride,
    entry_stride,
    GRAD_STEP: tl.constexpr,
    X_STEP: tl.constexpr,
    CHANNELS_INNERMOST: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    LANES: tl.constexpr,
):
    chunks = tl.cdiv(side, TAPS)  # of the taps of a row
    exists, c, strip, group = lane_place(lanes, channels, strips, side * chunks, CHANNELS_INNERMOST, LANES)
    i, first = tl.program_id(0) % (side * chunks) // chunks, tl.program_id(0) % chunks * TAPS
    column, around = strip * COLUMNS, side // 2
    start = column + first - around  # of the pixels under the taps
    sums = zero_sums(TAPS, LANES)
    for number in range(samples):
        sample = group * samples + number
        for row in range(tl.maximum(around - i, 0), tl.minimum(height, height + around - i)):
            grad_line = row_line(grad, sample, c, row, column, grad_strides, GRAD_STEP)
            line = row_line(x, sample, c, row + i - around, start, x_strides, X_STEP)
            incoming = _pixels(grad_line, column, width, GRAD_STEP, COLUMNS)
            pixels = _pixels(line, start, width, X_STEP, COLUMNS + TAPS - 1)
            updated = ()
            for t in tl.static_range(TAPS):
                total = sums[t]
                for q in tl.static_range(COLUMNS):
                    total += incoming[q] * pixels[q + t]
                updated = updated + (total,)
            sums = updated
    share = (group * strips + strip) * share_stride
    for t in tl.static_range(TAPS):
        entry = ((i * side + first + t) * channels + c).to(tl.int64) * entry_stride
        tl.store(shares + share + entry, sums[t], mask=exists & (first + t < side))


def convolve_wide(x: Tensor, merged: Tensor, out: Tensor, side: int, flipped: bool) -> None:
    """Launch the convolution of a map (B, C, H, W) with a merged kernel (side * side, C), turned by half or not."""
    batch, channels, height, width = x.shape
    strips = launching.cdiv(width, COLUMNS)
    lanes = batch * channels * strips
    launching.launch(
        _wide_convolution_kernel,
        (launching.cdiv(lanes, LANES) * height,),
        x,
        merged,
        out,
        *(lanes, channels, height, width, strips, side),
        strides_of(x),
        strides_of(out),
        X_STEP=x.stride(3),
        OUT_STEP=out.stride(3),
        FLIPPED=flipped,
        CHANNELS_INNERMOST=channels_innermost(x),
        COLUMNS=COLUMNS,
        TAPS=TAPS,
        LANES=LANES,
        num_warps=LANES // WARP_SIZE,
    )


def wide_shares(grad: Tensor, x: Tensor, side: int) -> Tensor:
    """Launch the gradient of the merged kernel in shares (shares, side * side, C)."""
    batch, channels, height, width = x.shape
    strips, programs = launching.cdiv(width, COLUMNS), side * launching.cdiv(side, TAPS)
    samples = samples_of(x, batch * channels * strips * programs)
    lanes = batch // samples * channels * strips
    shares = new_shares(x, batch // samples * strips, side)
    launching.launch(
        _wide_gradient_kernel,
        (launching.cdiv(lanes, LANES) * programs,),
        grad,
        x,
        shares,
        *(lanes, channels, height, width, strips, side, samples),
        strides_of(grad),
        strides_of(x),
        *(shares.stride(0), shares.stride(2)),
        GRAD_STEP=grad.stride(3),
        X_STEP=x.stride(3),
        CHANNELS_INNERMOST=channels_innermost(x),
        COLUMNS=COLUMNS,
        TAPS=TAPS,
        LANES=LANES,
        num_warps=LANES // WARP_SIZE,
    )
    return shares
