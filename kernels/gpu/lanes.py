"""What all kernels of depthwise convolutions share: lanes, each of which owns some columns of one channel of a map.

Lanes are numbered along whatever is innermost in the map, channels or columns, so that neighbours read neighbours.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning

LANES = 64  # of a program: few, so that they spread evenly
ENOUGH_LANES = 1 << 15  # fixed, so that the order of summation does not depend on the device
LEAST_ROWS = 16  # that a lane walks
WIDEST = 7  # merged kernel whose taps, or their gradient, fit into registers


@triton.jit
def lane_place(lanes, channels, strips, parts, CHANNELS_INNERMOST: tl.constexpr, LANES: tl.constexpr):
    """Return which of a program's lanes exist, and the channel, the strip of columns and the group of samples of each.

    Those that do not exist repeat the last one.
    """
    lane = tl.program_id(0) // parts * LANES + tl.arange(0, LANES)
    exists = lane < lanes
    lane = tl.minimum(lane, lanes - 1)
    if CHANNELS_INNERMOST:
        c, strip, group = lane % channels, lane // channels % strips, lane // channels // strips
    else:
        c, strip, group = lane // strips % channels, lane % strips, lane // strips // channels
    return exists, c, strip, group.to(tl.int64)


@triton.jit
def row_line(x, sample, c, row, column, strides, STEP: tl.constexpr):
    """Return where each lane's columns begin in a row."""
    start = x + sample * strides[0] + c.to(tl.int64) * strides[1]
    return start + tl.cast(row, tl.int64) * strides[2] + column.to(tl.int64) * STEP


@triton.jit
def pixels_around(
    line,
    row_exists,  # None where it always does
    column,
    width,
    STEP: tl.constexpr,
    AROUND: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether strips fill the width
):
    """Load each lane's columns of a row, and AROUND of them on both sides, in float32; zeros outside the map."""
    found = ()
    for i in tl.static_range(COLUMNS + 2 * AROUND):
        place, at = line + (i - AROUND) * STEP, column + (i - AROUND)
        if i < AROUND:
            pixel = tl.load(place, mask=column > 0 if AROUND <= COLUMNS else at >= 0, other=0.0)
        elif i >= COLUMNS + AROUND and WHOLE and AROUND <= COLUMNS:
            pixel = tl.load(place, mask=column + COLUMNS < width, other=0.0)
        elif i >= COLUMNS + AROUND or not WHOLE:
            pixel = tl.load(place, mask=at < width if row_exists is None else row_exists & (at < width), other=0.0)
        elif row_exists is None:
            pixel = tl.load(place)
        else:
            pixel = tl.load(place, mask=row_exists, other=0.0)
        found = found + (pixel.to(tl.float32),)
    return found


@triton.jit
def zero_sums(COUNT: tl.constexpr, LANES: tl.constexpr):
    """Return COUNT sums for each lane, in float32."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((LANES,), dtype=tl.float32),)
    return sums


@triton.jit
def of_existing(exists, values):
    """Zero the values of lanes that do not exist.

    That none of them counts is sure anyway. But values that enter a loop as they come out of it, converted alike, would
    be kept, and exchanged, as pairs of halves of registers, and converted inside.
    """
    chosen = ()
    for i in tl.static_range(len(values)):
        chosen = chosen + (tl.where(exists, values[i], 0.0),)
    return chosen


class Walk(NamedTuple):
    """How maps are shared out to lanes."""

    strips: int
    lanes: int  # of one sample each
    parts: int
    part_rows: int


def walk_of(x: Tensor, columns: int, multiple: int = 1) -> Walk:
    """Return how maps like x are shared out to lanes of so many columns, whose rows are a multiple of some number."""
    batch, channels, height, width = x.shape
    strips = launching.cdiv(width, columns)
    lanes = batch * channels * strips
    parts = max(1, min(launching.cdiv(ENOUGH_LANES, lanes), height // LEAST_ROWS))
    part_rows = launching.cdiv(height, parts * multiple) * multiple
    return Walk(strips, lanes, launching.cdiv(height, part_rows), part_rows)


def samples_of(x: Tensor, lanes: int) -> int:
    """Return how many samples a lane walks one after the other: a divisor of the batch that leaves enough lanes."""
    return math.gcd(x.shape[0], 1 << max(0, (lanes // ENOUGH_LANES).bit_length() - 1))


def new_shares(x: Tensor, count: int, side: int) -> Tensor:
    """Return memory for shares of a merged kernel's gradient, (count, side * side, C), that lies as lanes are numbered.

    An entry (tap, channel) lies ``tap * C + channel`` times the last stride from the first.
    """
    channels = x.shape[1]
    entries = side * side * channels
    steps = (entries, channels, 1) if channels_innermost(x) else (1, channels * count, count)
    shares = torch.empty(count * entries, dtype=torch.float32, device=x.device)
    return shares.as_strided((count, side * side, channels), steps)


def channels_innermost(x: Tensor) -> bool:
    """Tell along what lanes are numbered."""
    return x.stride(1) == 1


def shape_key(x: Tensor, *_: Any, **__: Any) -> tuning.Key:
    """Return what a choice depends on: the map's shape and whether channels are innermost."""
    return tuning.key_of(x, channels_innermost(x))
