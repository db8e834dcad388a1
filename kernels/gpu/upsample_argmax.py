"""Triton kernel of the argmax over upsampled logits.

A thread owns one column, and walks down some rows. It keeps the two coarse rows around the current one, interpolated
along themselves to its column, in registers: for every map and class, one value above and one below. A row of labels
then takes one interpolation between the two; coarse logits are read, and interpolated along their row, only where the
walk passes a coarse row. The maps are added up, and the largest sum and its class kept. Only the labels are written,
one byte each.

As many classes as registers allow are walked with at once. Where there are more, the walk is repeated for the next
ones, and takes up the labels and sums that it wrote before; the last walk takes some classes again, which changes
nothing.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* labels, B=24 K=9 H=224 W=224: 2.93 bytes per element, least 2.93; 0.8 us, floor 0.8 us
Coarse maps are read once from memory; the neighbours of every pixel come from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning

WARP_SIZE = 64 if torch.version.hip else 32
COLUMNS = (128, 64, WARP_SIZE)  # of a program, one for each thread
CHOICES = ({"rows": 16}, {"rows": 8}, {"rows": 32})  # that a program walks over
MOST_TOGETHER = 32  # classes of all maps whose rows a thread keeps


@triton.jit
def _centre(place, scale):
    """Return where the centre of a fine place lies among the coarse ones."""
    return tl.maximum((place + 0.5) * scale - 0.5, 0.0)


@triton.jit
def _along(start, row, row_stride, class_stride, column_stride, width, scale, x, exists, K: tl.constexpr):
    """Return K vectors: a coarse row of K classes, interpolated along itself to the columns x."""
    centre = _centre(x, scale)
    left = tl.minimum(centre.to(tl.int32), width - 1)
    right = tl.minimum(left + 1, width - 1)
    second = centre - left.to(tl.float32)
    row_start = start + row.to(tl.int64) * row_stride
    before = row_start + left.to(tl.int64) * column_stride
    after = row_start + right.to(tl.int64) * column_stride
    found = ()
    for _k in tl.static_range(K):
        value = (1.0 - second) * tl.load(before, mask=exists, other=0.0).to(tl.float32)
        found = found + (value + second * tl.load(after, mask=exists, other=0.0).to(tl.float32),)
        before += class_stride
        after += class_stride
    return found


@triton.jit
def _around(
    centre, height, start, row_stride, class_stride, column_stride, width, scale, x, exists, K: tl.constexpr
):  # fmt: skip
    """Return the number of the coarse row above a centre, that row, and the next."""
    above = tl.minimum(centre.to(tl.int32), height - 1)
    below = tl.minimum(above + 1, height - 1)
    upper = _along(start, above, row_stride, class_stride, column_stride, width, scale, x, exists, K)
    lower = _along(start, below, row_stride, class_stride, column_stride, width, scale, x, exists, K)
    return above.to(tl.float32), upper, lower


@triton.jit
def _passed(
    number, upper, lower, centre, height, start, row_stride, class_stride, column_stride, width, scale, x, exists,
    K: tl.constexpr,
):  # fmt: skip
    """Return the number of the coarse row above a centre, that row and the next, from those of a centre above it."""
    while centre >= number + 1.0:
        number += 1.0
        upper = lower
        next_row = tl.minimum(number.to(tl.int32) + 1, height - 1)
        lower = _along(start, next_row, row_stride, class_stride, column_stride, width, scale, x, exists, K)
    return number, upper, lower


@triton.jit
def _largest(totals, largest, label, first, K: tl.constexpr):
    """Return the largest of some sums and its class. NaN is the largest, and the first of them stays."""
    for k in tl.static_range(K):
        larger = ~(totals[k] <= largest) & (largest == largest)
        label = tl.where(larger, first + k, label)
        largest = tl.where(larger, totals[k], largest)
    return largest, label


@triton.jit
def _upsample_argmax_kernel(
    maps,  # N pointers to (B, K, h, w) by strides
    labels,  # (B, H, W) uint8
    sums,  # (B, H, W) float32: those of the labels, or None if all classes are walked with at once
    classes,
    walks,
    height,
    width,
    heights,  # of the N maps, as are the following
    widths,
    batch_strides,
    class_strides,
    row_strides,
    column_strides,
    row_scales,  # coarse rows per row
    column_scales,
    N: tl.constexpr,
    K: tl.constexpr,  # classes of one walk
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(width, COLUMNS)
    strips = tl.cdiv(height, ROWS)
    x = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.program_id(0) // blocks % strips * ROWS
    sample = (tl.program_id(0) // (blocks * strips)).to(tl.int64)
    exists = x < width
    for walk in range(walks):
        first = tl.minimum(walk * K, classes - K)
        starts = ()
        numbers = ()  # of the coarse rows above
        uppers = ()  # N times K vectors: these rows
        lowers = ()  # and the next
        for n in tl.static_range(N):
            start = maps[n] + sample * batch_strides[n] + first.to(tl.int64) * class_strides[n]
            number, upper, lower = _around(
                _centre(top, row_scales[n]), heights[n], start, row_strides[n], class_strides[n], column_strides[n],
                widths[n], column_scales[n], x, exists, K,
            )  # fmt: skip
            starts = starts + (start,)
            numbers = numbers + (number,)
            uppers = uppers + (upper,)
            lowers = lowers + (lower,)
        for step in range(tl.minimum(ROWS, height - top)):
            y = top + step
            passed = ()
            totals = ()
            for n in tl.static_range(N):
                centre = _centre(y, row_scales[n])
                number, upper, lower = _passed(
                    numbers[n], uppers[n], lowers[n], centre, heights[n], starts[n], row_strides[n], class_strides[n],
                    column_strides[n], widths[n], column_scales[n], x, exists, K,
                )  # fmt: skip
                added = ()
                for k in tl.static_range(K):
                    value = (1.0 - (centre - number)) * upper[k] + (centre - number) * lower[k]
                    added = added + (value if n == 0 else totals[k] + value,)
                totals = added
                passed = passed + (number, upper, lower)
            numbers, uppers, lowers = passed[0::3], passed[1::3], passed[2::3]
            place = (sample * height + y) * width + x
            largest = tl.full((COLUMNS,), -float("inf"), dtype=tl.float32)
            label = tl.zeros((COLUMNS,), dtype=tl.int32)
            if sums is not None:
                largest = tl.load(sums + place, mask=exists & (walk > 0), other=-float("inf"))
                label = tl.load(labels + place, mask=exists & (walk > 0), other=0).to(tl.int32)
            largest, label = _largest(totals, largest, label, first, K)
            if sums is not None:
                tl.store(sums + place, largest, mask=exists)
            tl.store(labels + place, label.to(tl.uint8), mask=exists)


@tuning.tunable(CHOICES, lambda maps, *size: tuning.key_of(maps[0], len(maps), *size))
def forward(choice: tuning.Choice, logits: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Launch the kernel on maps (B, K, h, w)."""
    batch, classes = logits[0].shape[:2]
    labels = torch.empty((batch, height, width), dtype=torch.uint8, device=logits[0].device)
    if batch == 0:
        return labels
    heights, widths = tuple(m.shape[2] for m in logits), tuple(m.shape[3] for m in logits)
    strides = zip(*(m.stride() for m in logits), strict=True)
    together, walks = walks_of(len(logits), classes)
    rows, columns = choice["rows"], columns_of(width)
    with torch.cuda.device_of(labels):
        launching.launch(
            _upsample_argmax_kernel,
            (batch * launching.cdiv(height, rows) * launching.cdiv(width, columns),),
            tuple(logits),
            labels,
            torch.empty_like(labels, dtype=torch.float32) if walks > 1 else None,
            classes,
            walks,
            height,
            width,
            heights,
            widths,
            *strides,
            tuple(coarse / height for coarse in heights),
            tuple(coarse / width for coarse in widths),
            N=len(logits),
            K=together,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=columns // WARP_SIZE,
        )
    return labels


def walks_of(maps: int, classes: int) -> tuple[int, int]:
    """Return how many classes a program walks with at once, and how often it walks."""
    walks = launching.cdiv(classes, max(1, MOST_TOGETHER // maps))
    return launching.cdiv(classes, walks), walks


def columns_of(width: int) -> int:
    """Return how many columns a program takes: those that leave the fewest threads of a row idle, and of these most."""
    return min(COLUMNS, key=lambda columns: (-width % columns, -columns))
