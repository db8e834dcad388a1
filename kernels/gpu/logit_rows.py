"""What the kernels of the segmentation sums share: walks down the rows of logit maps, full or coarse, and their labels.

A thread owns one pixel at a time. A tile is TILE pixels of one row; a program walks down some rows of one sample. Where
no map is coarse, the pixels are not rows but one line, cut into rows of TILE pixels.

Between two rows of a coarse map its logits change by the same slope from one row of pixels to the next: a thread adds
that, and reads, and interpolates along itself, one further row where the walk passes a row of the map. (The row above
is then what the last slope led to, up to rounding. A NaN or an infinity therefore also reaches the pixels below it that
the same program walks to.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning

TILE = 64  # pixels, one per thread
WARP_SIZE = 64 if torch.version.hip else 32
WARPS = TILE // WARP_SIZE


@triton.jit
def centre_of(place, fine, coarse):
    """Return where the centre of one of the fine places lies among the coarse ones."""
    return (place + 0.5) * ((coarse * 1.0) / (fine * 1.0)) - 0.5


@triton.jit
def full_row(maps, strides, sample, row, columns, I: tl.constexpr, K: tl.constexpr):
    """Return K vectors: the logits of map I, at full size, at some pixels of a row.

    Addresses move on from class to class: computed from the number of the class, the compiler would keep one for each.
    """
    found = ()
    start = maps[I] + sample * strides[4 * I] + row.to(tl.int64) * strides[4 * I + 2]
    place = start + columns.to(tl.int64) * strides[4 * I + 3]
    for _k in tl.static_range(K):
        found = found + (tl.load(place).to(tl.float32),)
        place += strides[4 * I + 1]
    return found


@triton.jit
def coarse_row(maps, strides, sizes, sample, number, columns, width, I: tl.constexpr, K: tl.constexpr):
    """Return K vectors: a row of map I, which is coarse, interpolated along itself to the columns of some pixels.

    The number of the row is a float; outside of the map the nearest row is taken.
    """
    found = ()
    height = sizes[2 * I]
    centre = centre_of(columns, width, sizes[2 * I + 1])
    first = tl.floor(centre)
    beside = centre - first
    left = tl.maximum(first.to(tl.int32), 0)
    right = tl.minimum(first.to(tl.int32) + 1, sizes[2 * I + 1] - 1)
    start = maps[I] + sample * strides[4 * I]
    start += tl.minimum(tl.maximum(number, 0.0), height - 1.0).to(tl.int64) * strides[4 * I + 2]
    near = start + left.to(tl.int64) * strides[4 * I + 3]
    beyond = start + right.to(tl.int64) * strides[4 * I + 3]
    for _k in tl.static_range(K):
        found = found + (tl.load(near).to(tl.float32) * (1 - beside) + tl.load(beyond).to(tl.float32) * beside,)
        near += strides[4 * I + 1]
        beyond += strides[4 * I + 1]
    return found


@triton.jit
def before_first_row(
    maps, strides, sizes, sample, row, columns, rows, width, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Return the state of a walk that begins at a row: what `next_row` makes of it is that of this row.

    That is N numbers of the coarse rows above, as floats, N * K logits and as many slopes.
    """
    numbers = ()
    logits = ()
    slopes = ()
    for i in tl.static_range(N):
        for _k in tl.static_range(K):
            slopes = slopes + (tl.zeros(columns.shape, dtype=tl.float32),)
        if sizes[2 * i] is None:
            numbers = numbers + (0.0,)
            logits = logits + slopes[i * K : i * K + K]
        else:
            number = tl.floor(centre_of(row, rows, sizes[2 * i]))
            numbers = numbers + (number - 1.0,)
            logits = logits + coarse_row(maps, strides, sizes, sample, number, columns, width, i, K)
    return numbers, logits, slopes


@triton.jit
def added(first, second, K: tl.constexpr):
    """Return K vectors: the sums of two tuples of them."""
    found = ()
    for k in tl.static_range(K):
        found = found + (first[k] + second[k],)
    return found


@triton.jit
def past_a_coarse_row(values, slopes, below, share, ratio, K: tl.constexpr):
    """Return K logits, and their slopes, where a walk has just passed a coarse row.

    Args:
        values: logits by the slopes before.
        slopes: those before.
        below: the next coarse row.
        share: how far the walk has come from the row that it passed to the next.
        ratio: coarse rows for each row of pixels.
        K: classes.
    """
    new_values = ()
    new_slopes = ()
    for k in tl.static_range(K):
        passed = values[k] - slopes[k] * (share / ratio)
        difference = below[k] - passed
        new_values = new_values + (passed + difference * share,)
        new_slopes = new_slopes + (difference * ratio,)
    return new_values, new_slopes


@triton.jit
def last_column(row, width, pixels):
    """Return the last of a row's columns; the last row of a line may be short."""
    return tl.minimum(width, pixels - row.to(tl.int64) * width).to(tl.int32) - 1


@triton.jit
def labels(target, strides, sample, row, columns, exists, IGNORED, K: tl.constexpr):
    """Return the class of some pixels, which of them count (1 or 0), and which have a class that does not exist."""
    places = row.to(tl.int64) * strides[1] + columns.to(tl.int64) * strides[2]
    label = tl.load(target + sample * strides[0] + places)
    counts = exists
    if IGNORED is not None:
        counts = counts & (label != IGNORED)
    wrong = counts & ((label < 0) | (label >= K))
    return tl.where(wrong, -1, label).to(tl.int32), counts, wrong


def walk_key(maps: Sequence[Tensor], target: Tensor) -> tuning.Key:
    """Return what the best length of a walk depends on."""
    return tuning.key_of(maps[0], len(maps), target.shape)


class Walk:
    """How the programs of a launch walk over the pixels: down the rows, or along the one line that they form."""

    def __init__(self, maps: Sequence[Tensor], target: Tensor, steps: int) -> None:
        layouts = tuple([(m.shape, m.stride()) for m in maps])
        (
            self.samples, self.width, self.strips, self.programs, self.geometry, self.folded, strides, sizes, of_target
        ) = _walk(layouts, target.shape, target.stride(), steps)  # fmt: skip
        self.steps = steps
        self.grid = (self.samples * self.programs,)
        self.reads = (tuple(maps), strides, sizes, target, of_target)

    def reads_of(self, count: int) -> tuple[Any, ...]:
        """Return what a launch reads that has the first maps alone."""
        maps, strides, sizes, *of_target = self.reads
        return maps[:count], strides[: 4 * count], sizes[: 2 * count], *of_target

    def partial_rows(self, i: int, classes: int) -> Tensor:
        """Return memory for the coarse rows of map i that each program touches."""
        shape = (self.samples, self.strips, self.folded[i], classes, self.width)
        return self.reads[3].new_empty(shape, dtype=torch.float32)


@lru_cache(maxsize=256)
def _walk(
    layouts: tuple[tuple[torch.Size, tuple[int, ...]], ...],
    shape: torch.Size,
    target_strides: tuple[int, ...],
    steps: int,
) -> tuple[Any, ...]:
    """Return what a `Walk` knows of maps of these shapes and strides; training asks for the same at every step."""
    samples, height, width = shape
    full = [shape[2] == height and shape[3] == width for shape, _ in layouts]
    line = all(full) and all(s[-2] == width * s[-1] for s in (*(s for _, s in layouts), target_strides))
    rows, columns = (launching.cdiv(height * width, TILE), TILE) if line else (height, width)
    across, strips = launching.cdiv(columns, TILE), launching.cdiv(rows, steps)
    strides = [s for _, (b, c, h, w) in layouts for s in (b, c, TILE * w if line else h, w)]
    sizes = [None if whole else s for (m, _), whole in zip(layouts, full, strict=True) for s in m[2:]]
    b, h, w = target_strides
    folded = [
        0 if whole else launching.cdiv((steps - 1) * m[2], height) + 3
        for (m, _), whole in zip(layouts, full, strict=True)
    ]
    geometry = (rows, columns, height * width, across, strips)
    of_target = (b, TILE * w if line else h, w)
    return samples, width, strips, across * strips, geometry, folded, tuple(strides), tuple(sizes), of_target
