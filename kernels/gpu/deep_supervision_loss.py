"""Triton kernels of the deeply supervised loss: the segmentation sums of maps at several resolutions, and gradients.

A level is one map at full size and a target of its own, which may be a strided view of another level's. All levels are
one launch: each program has one of them, finds by its number which, and walks as for a single map: see
`segmentation_sums`. So do the programs that add up the partial sums, and those of the last formula, see
`segmentation_loss`. No atomics, and a fixed order: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 K=4 H=256 W=256: 3.50 bytes per element, least 3.50; 9.1 us, floor 9.1 us; exponentials 3.1 us
* backward, B=32 K=4 H=256 W=256: 5.50 bytes per element, least 5.50; 14.3 us, floor 14.3 us; exponentials 3.1 us
The elements are those of five levels. The labels' 8 bytes are shared by the classes of a pixel, and those of the coarse
levels are among those of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .logit_rows import TILE, WARPS, Walk, full_row, labels, last_column
from .segmentation_sums import (
    ADDED_COLUMNS,
    ADDED_ROWS,
    FORWARD_CHOICES,
    add_programs,
    most_steps,
    sum_along_walk,
)
from .segmentation_sums_backward import BACKWARD_CHOICES, pixel_gradients, store_classes


@triton.jit
def _level_of(program, ends, L: tl.constexpr):
    """Return a program's level, and the first program of that level."""
    level = tl.full((), 0, tl.int32)
    first = tl.full((), 0, tl.int32)
    for i in tl.static_range(1, L):
        level = tl.where(program >= ends[i - 1], i, level)
        first = tl.where(program >= ends[i - 1], ends[i - 1], first)
    return level, first


@triton.jit
def _of_level(level, values, PLACE: tl.constexpr, EACH: tl.constexpr, L: tl.constexpr):
    """Return a level's value at a place, where every level has so many, one level's after the other's."""
    value = values[PLACE]
    for i in tl.static_range(1, L):
        value = tl.where(level == i, values[i * EACH + PLACE], value)
    return value


@triton.jit
def _all_of_level(level, values, EACH: tl.constexpr, L: tl.constexpr):
    """Return all of a level's values."""
    found = ()
    for place in tl.static_range(EACH):
        found = found + (_of_level(level, values, place, EACH, L),)
    return found


@triton.jit
def _level_sums_kernel(
    maps,  # for each level (B, K, h, w)
    strides,  # 4 for each level
    targets,  # for each level (B, h, w) int64
    target_strides,  # 3 for each level
    partial,  # (programs * WARPS, 2 K + 1) float32: intersection, predicted, nll
    partial_true,  # (programs * WARPS, K) float32
    geometry,  # for each level, see `Walk`: rows, width, pixels, tiles across and strips
    ends,  # for each level: the number of its programs, and of those of the levels before
    IGNORED,
    L: tl.constexpr,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    WARPS: tl.constexpr,
):
    program = tl.program_id(0)
    level, first = _level_of(program, ends, L)
    rows, width, pixels, tiles_across, strips = _all_of_level(level, geometry, 5, L)
    programs = strips * tiles_across
    sum_along_walk(
        ((program - first) // programs).to(tl.int64),
        (program - first) % programs,
        program.to(tl.int64),
        tl.full((), 0, tl.int32),  # the one group of subsets
        (_of_level(level, maps, 0, 1, L),),
        _all_of_level(level, strides, 4, L),
        (None, None),
        _of_level(level, targets, 0, 1, L),
        _all_of_level(level, target_strides, 3, L),
        partial,
        partial_true,
        rows,
        width,
        pixels,
        tiles_across,
        IGNORED,
        N=1,
        K=K,
        UNROLLED=1,
        FIRST=1,
        END=2,
        SUBSETS=1,
        SQUARED=False,
        STEPS=STEPS,
        TILE=TILE,
        WARPS=WARPS,
    )


@triton.jit
def _add_levels_kernel(
    partial,  # (programs * WARPS, columns)
    partial_true,  # (programs * WARPS, classes)
    sums,  # (B, L, columns)
    true,  # (B, L, classes)
    starts,  # for each level: its first row of partial sums
    counts,  # and how many rows each of its samples has
    columns,
    classes,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(columns + classes, COLUMNS)
    place = tl.program_id(0) // blocks
    level = place % L
    count = _of_level(level, counts, 0, 1, L)
    first = _of_level(level, starts, 0, 1, L) + (place // L).to(tl.int64) * count
    block = tl.program_id(0) % blocks
    add_programs(
        first, count, place.to(tl.int64), block, partial, partial_true, sums, true, columns, classes, ROWS, COLUMNS
    )


@triton.jit
def _level_gradients_kernel(
    slopes,  # (B, L, 2 K + 1) float32: gradients of intersection, predicted and nll
    maps,
    strides,
    targets,
    target_strides,
    grads,  # for each level (B, K, pixels)
    geometry,
    ends,
    IGNORED,
    L: tl.constexpr,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    level, first = _level_of(program, ends, L)
    rows, width, pixels, tiles_across, strips = _all_of_level(level, geometry, 5, L)
    own_strides = _all_of_level(level, strides, 4, L)
    own_target = _of_level(level, targets, 0, 1, L)
    own_target_strides = _all_of_level(level, target_strides, 3, L)
    programs = strips * tiles_across
    sample = ((program - first) // programs).to(tl.int64)
    part = (program - first) % programs
    tile = (part % tiles_across) * TILE + tl.arange(0, TILE)
    top = (part // tiles_across) * STEPS
    slopes += (sample * L + level) * (2 * K + 1)
    own_map = (_of_level(level, maps, 0, 1, L),)
    grad = _of_level(level, grads, 0, 1, L) + sample * K * pixels + tile
    for step in range(0, tl.minimum(STEPS, rows - top)):
        row = top + step
        last = last_column(row, width, pixels)
        columns = tl.minimum(tile, last)
        exists = tile <= last
        label, counts, wrong = labels(own_target, own_target_strides, sample, row, columns, exists, IGNORED, K)
        logits = full_row(own_map, own_strides, sample, row, columns, 0, K)
        found = pixel_gradients(slopes, logits, label, counts, wrong, UNROLLED=1, N=1, K=K, SQUARED=False)
        store_classes(grad + row.to(tl.int64) * width, pixels, found, exists, K)


class _Levels:
    """How the programs of a launch share out the levels, and what they read."""

    def __init__(self, maps: Sequence[Tensor], targets: Sequence[Tensor], steps: int) -> None:
        self.steps = steps
        self.walks = [Walk([logits], target, steps) for logits, target in zip(maps, targets, strict=True)]
        reads = [walk.reads for walk in self.walks]
        strides, of_targets = (tuple(chain.from_iterable(read[i] for read in reads)) for i in (1, 4))
        self.reads = (tuple(maps), strides, tuple(targets), of_targets)
        self.geometry = tuple(chain.from_iterable(walk.geometry for walk in self.walks))
        self.ends = tuple(accumulate(walk.grid[0] for walk in self.walks))


def _key(maps: Sequence[Tensor], *_: object) -> tuning.Key:
    return tuning.key_of(maps[0], len(maps))


@tuning.tunable(FORWARD_CHOICES, _key)
def forward(
    choice: tuning.Choice,
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernels; return intersection, predicted and nll as one, (B, L, 2 K + 1), and true (B, L, K).

    Args:
        maps: for each level (B, K, h, w), all of one type.
        targets: for each level (B, h, w), none of them empty.
        ignore_index: a class whose pixels count for nothing.
    """
    samples, classes = maps[0].shape[:2]
    levels = _Levels(maps, targets, min(choice["steps"], most_steps(classes)))
    columns, rows = 2 * classes + 1, levels.ends[-1] * WARPS
    partial, partial_true, sums, true = (
        maps[0].new_empty(shape, dtype=torch.float32)
        for shape in ((rows, columns), (rows, classes), (samples, len(maps), columns), (samples, len(maps), classes))
    )
    with torch.cuda.device_of(partial):
        launching.launch(
            _level_sums_kernel,
            (levels.ends[-1],),
            *levels.reads,
            partial,
            partial_true,
            levels.geometry,
            levels.ends,
            ignore_index,
            L=len(maps),
            K=classes,
            STEPS=levels.steps,
            TILE=TILE,
            WARPS=WARPS,
            num_warps=WARPS,
        )
        launching.launch(
            _add_levels_kernel,
            (len(maps) * samples * launching.cdiv(columns + classes, ADDED_COLUMNS),),
            partial,
            partial_true,
            sums,
            true,
            tuple(WARPS * start for start in (0, *levels.ends[:-1])),
            tuple(WARPS * walk.programs for walk in levels.walks),
            columns,
            classes,
            L=len(maps),
            ROWS=ADDED_ROWS,
            COLUMNS=ADDED_COLUMNS,
            num_warps=WARPS,
        )
    return sums, true


@tuning.tunable(BACKWARD_CHOICES, lambda slopes, *given: _key(*given))
def backward(
    choice: tuning.Choice,
    slopes: Tensor,
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    ignore_index: int | None,
) -> list[Tensor]:
    """Launch the backward kernel on the gradients of the sums (B, L, 2 K + 1); return that of each map."""
    levels = _Levels(maps, targets, choice["steps"])
    grads = [logits.new_empty(logits.shape) for logits in maps]
    with torch.cuda.device_of(slopes):
        launching.launch(
            _level_gradients_kernel,
            (levels.ends[-1],),
            slopes.contiguous(),
            *levels.reads,
            tuple(grads),
            levels.geometry,
            levels.ends,
            ignore_index,
            L=len(maps),
            K=maps[0].shape[1],
            STEPS=levels.steps,
            TILE=TILE,
            num_warps=WARPS,
        )
    return grads
