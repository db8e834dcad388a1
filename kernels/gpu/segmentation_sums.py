"""Triton kernels of the segmentation sums, forward: for one map the sums of `dice_ce_loss`, for n of `mutation_loss`.

A thread owns one pixel at a time: it reads, or interpolates, the logits of all maps and classes into registers, and
adds them up for every subset, relative to whose maximum it takes exponentials. (The maps' own exponentials, multiplied,
would be fewer, but underflow where maps disagree, and take the registers of the logits once more.) A tile is TILE
pixels of one row; a program walks down some rows of one sample. Where no map is coarse, the pixels are not rows but one
line, cut into rows of TILE pixels.

A subset's sums stay in registers during the walk, and each program writes one partial sum; a second launch adds these
up for each sample. As many subsets as registers
allow share a program, and its neighbour, for others, finds the logits in a cache: it is one launch for all subsets. No
atomics, and a fixed order: results repeat bit for bit.

A class that does not exist is never used as an address; its pixel's nll is NaN.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=24 K=9 H=224 W=224 N=1: 2.89 bytes per element, least 2.89; 7.3 us, floor 7.3 us; exponentials 3.0 us
* forward, B=24 K=9 H=224 W=224 N=3: 2.30 bytes per element, least 2.30; 17.4 us, floor 17.4 us; exponentials 21.1 us
The labels' 8 bytes are shared by the classes and maps of a pixel. All subsets are read in one launch. Exponentials bind
where seven subsets need 63 of them a pixel; maps' own exponentials, multiplied, would be 27.
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

TILE = 128  # pixels, one per thread
WARP_SIZE = 64 if torch.version.hip else 32
FORWARD_CHOICES = ({"steps": 16}, {"steps": 8}, {"steps": 32})  # tiles that a program walks over
STEPS = FORWARD_CHOICES[0]["steps"]
ADDED_ROWS, ADDED_COLUMNS = 32, 32  # of the tile in which the programs' sums are added up
REGISTERS = 150  # sums, logits and probabilities of one thread in the forward pass


@triton.jit
def between(position, full, size):
    """Return the first of the two coarse cells around a pixel, and the weight of the second."""
    centre = (position + 0.5) * ((size * 1.0) / (full * 1.0)) - 0.5
    centre = tl.minimum(tl.maximum(centre, 0.0), size - 1.0)
    first = tl.floor(centre)
    return first.to(tl.int32), centre - first


@triton.jit
def _logits(maps, strides, sizes, sample, row, columns, exists, rows, width, I: tl.constexpr, K: tl.constexpr):
    """Return K vectors: the logits of map I at some pixels of a row; 0 or the nearest cell's where there is no pixel.

    Addresses move on from class to class: computed from the number of the class, the compiler would keep one for each.
    """
    found = ()
    start = maps[I] + sample * strides[4 * I]
    if sizes[2 * I] is None:
        place = start + row.to(tl.int64) * strides[4 * I + 2] + columns.to(tl.int64) * strides[4 * I + 3]
        for _k in tl.static_range(K):
            found = found + (tl.load(place, mask=exists, other=0.0).to(tl.float32),)
            place += strides[4 * I + 1]
    else:
        top, below = between(row, rows, sizes[2 * I])
        left, beside = between(columns, width, sizes[2 * I + 1])
        near = start + left.to(tl.int64) * strides[4 * I + 3]
        beyond = start + tl.minimum(left + 1, sizes[2 * I + 1] - 1).to(tl.int64) * strides[4 * I + 3]
        upper_row = top.to(tl.int64) * strides[4 * I + 2]
        lower_row = tl.minimum(top + 1, sizes[2 * I] - 1).to(tl.int64) * strides[4 * I + 2]
        for _k in tl.static_range(K):
            upper = tl.load(near + upper_row).to(tl.float32) * (1 - beside)
            upper += tl.load(beyond + upper_row).to(tl.float32) * beside
            lower = tl.load(near + lower_row).to(tl.float32) * (1 - beside)
            lower += tl.load(beyond + lower_row).to(tl.float32) * beside
            found = found + (upper * (1 - below) + lower * below,)
            upper_row += strides[4 * I + 1]
            lower_row += strides[4 * I + 1]
    return found


@triton.jit
def all_logits(maps, strides, sizes, sample, row, columns, exists, rows, width, N: tl.constexpr, K: tl.constexpr):
    """Return N * K vectors."""
    found = ()
    for i in tl.static_range(N):
        found = found + _logits(maps, strides, sizes, sample, row, columns, exists, rows, width, i, K)
    return found


@triton.jit
def softmax(logits, label, members, N: tl.constexpr, K: tl.constexpr):
    """Return the K probabilities of a subset's sum, and -log p of the label; ``members`` holds 1 or 0 for each map."""
    summed = ()
    largest = tl.full(label.shape, -float("inf"), tl.float32)
    for k in tl.static_range(K):
        value = tl.zeros_like(largest)
        for i in tl.static_range(N):
            value += tl.where(members[i] != 0, logits[i * K + k], 0.0)
        largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
        summed = summed + (value,)
    total = tl.zeros_like(largest)
    reached = tl.zeros_like(largest)
    exponentials = ()
    for k in tl.static_range(K):
        distance = summed[k] - largest
        reached = tl.where(label == k, distance, reached)
        exponential = tl.exp(distance)
        total += exponential
        exponentials = exponentials + (exponential,)
    inverse = 1 / total
    p = ()
    for k in tl.static_range(K):
        p = p + (exponentials[k] * inverse,)
    return p, tl.log(total) - reached


@triton.jit
def labels(target, strides, sample, row, columns, exists, IGNORED, K: tl.constexpr):
    """Return the class of some pixels, which of them count (1 or 0), and which have a class that does not exist."""
    places = row.to(tl.int64) * strides[1] + columns.to(tl.int64) * strides[2]
    label = tl.load(target + sample * strides[0] + places, mask=exists, other=0)
    counts = exists
    if IGNORED is not None:
        counts = counts & (label != IGNORED)
    wrong = counts & ((label < 0) | (label >= K))
    return tl.where(wrong, -1, label).to(tl.int32), counts, wrong


@triton.jit
def _segmentation_sums_fwd_kernel(
    maps,  # N pointers to (B, K, h, w)
    strides,  # 4 for each map
    sizes,  # 2 for each map: its height and width, or None where they are the target's
    target,  # (B, H, W) int64
    target_strides,
    partial,  # (B, programs, SUBSETS, 2 K + 1) float32: intersection, predicted, nll
    partial_true,  # (B, programs, K) float32
    rows,
    width,
    pixels,  # of one sample
    tiles_across,
    strips,
    IGNORED,
    N: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,  # subsets of one program
    SUBSETS: tl.constexpr,
    SQUARED: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    programs = strips * tiles_across
    groups: tl.constexpr = (SUBSETS + COUNT - 1) // COUNT
    first = tl.program_id(0) % groups * COUNT  # neighbours read the same pixels, for other subsets
    place = (tl.program_id(0) // groups).to(tl.int64)
    sample = place // programs
    part = (place % programs).to(tl.int32)
    columns = (part % tiles_across) * TILE + tl.arange(0, TILE)
    top = (part // tiles_across) * STEPS
    steps = tl.minimum(STEPS, rows - top)
    sums = ()
    for _j in tl.static_range(COUNT * (2 * K + 1) + K):
        sums = sums + (tl.zeros((TILE,), dtype=tl.float32),)
    for step in range(0, steps):
        row = top + step
        exists = (columns < width) & (row.to(tl.int64) * width + columns < pixels)
        label, counts, wrong = labels(target, target_strides, sample, row, columns, exists, IGNORED, K)
        weight = tl.where(counts, 1.0, 0.0)
        logits = all_logits(maps, strides, sizes, sample, row, columns, exists, rows, width, N, K)
        added = ()
        for s in tl.static_range(COUNT):
            members = ()
            for i in tl.static_range(N):
                members = members + (((first + s + 1) >> i) & 1,)
            p, missed = softmax(logits, label, members, N, K)
            for k in tl.static_range(K):
                if N == 1:  # noqa: SIM108 - the same; in the form of TAFF-UNet only this one spills nothing on sm_90
                    hit = tl.where(label == k, weight * p[k], 0.0)
                else:
                    hit = tl.where(counts & (label == k), p[k], 0.0)
                added = added + (sums[s * (2 * K + 1) + k] + hit,)
            for k in tl.static_range(K):
                size = weight * p[k]
                if SQUARED:
                    size *= p[k]
                added = added + (sums[s * (2 * K + 1) + K + k] + size,)
            missed = tl.where(wrong, float("nan"), tl.where(counts, missed, 0.0))
            added = added + (sums[s * (2 * K + 1) + 2 * K] + missed,)
        for k in tl.static_range(K):
            added = added + (sums[COUNT * (2 * K + 1) + k] + tl.where(counts & (label == k), 1.0, 0.0),)
        sums = added
    for s in tl.static_range(COUNT):
        for j in tl.static_range(2 * K + 1):
            start = partial + (place * SUBSETS + first + s) * (2 * K + 1)
            tl.store(start + j, tl.sum(sums[s * (2 * K + 1) + j], axis=0), mask=first + s < SUBSETS)
    for k in tl.static_range(K):
        tl.store(partial_true + place * K + k, tl.sum(sums[COUNT * (2 * K + 1) + k], axis=0), mask=first == 0)


@triton.jit
def _add_programs_kernel(
    partial,  # (B, programs, columns)
    partial_true,  # (B, programs, classes)
    sums,  # (B, columns)
    true,  # (B, classes)
    programs,
    columns,
    classes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(columns + classes, COLUMNS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    of_sums = column < columns
    of_true = (column >= columns) & (column < columns + classes)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        row = (sample * programs + program)[:, None]
        there = (program < programs)[:, None]
        total += tl.load(partial + row * columns + column[None, :], mask=there & of_sums[None, :], other=0.0)
        place = partial_true + row * classes + (column - columns)[None, :]
        total += tl.load(place, mask=there & of_true[None, :], other=0.0)
    added = tl.sum(total, axis=0)
    tl.store(sums + sample * columns + column, added, mask=of_sums)
    tl.store(true + sample * classes + (column - columns), added, mask=of_true)


@tuning.tunable(FORWARD_CHOICES, lambda maps, target, *_: walk_key(maps, target))
def forward(
    choice: tuning.Choice, maps: Sequence[Tensor], target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; return intersection, predicted and nll as one, (B, S, 2 K + 1), and true (B, K)."""
    walk = Walk(maps, target, choice["steps"])
    classes, subsets = maps[0].shape[1], 2 ** len(maps) - 1
    partial = target.new_empty((walk.samples, walk.programs, subsets, 2 * classes + 1), dtype=torch.float32)
    partial_true = target.new_empty((walk.samples, walk.programs, classes), dtype=torch.float32)
    sums = target.new_empty((walk.samples, subsets, 2 * classes + 1), dtype=torch.float32)
    true = target.new_empty((walk.samples, classes), dtype=torch.float32)
    together = subsets_per_program(len(maps), classes)
    grid = (walk.grid[0] * launching.cdiv(subsets, together),)
    if grid[0]:
        with torch.cuda.device_of(target):
            launching.launch(
                _segmentation_sums_fwd_kernel,
                grid,
                *walk.reads,
                partial,
                partial_true,
                *walk.geometry,
                ignore_index,
                N=len(maps),
                K=classes,
                COUNT=together,
                SUBSETS=subsets,
                SQUARED=squared,
                STEPS=walk.steps,
                TILE=TILE,
                num_warps=TILE // WARP_SIZE,
            )
            launching.launch(
                _add_programs_kernel,
                (walk.samples * launching.cdiv(subsets * (2 * classes + 1) + classes, ADDED_COLUMNS),),
                partial,
                partial_true,
                sums,
                true,
                walk.programs,
                subsets * (2 * classes + 1),
                classes,
                ROWS=ADDED_ROWS,
                COLUMNS=ADDED_COLUMNS,
                num_warps=TILE // WARP_SIZE,
            )
    else:
        sums.zero_()
        true.zero_()
    return sums, true


def subsets_per_program(maps: int, classes: int) -> int:
    """Return how many subsets share a program: as many as fit a thread's registers, in groups as even as possible."""
    most = max(1, (REGISTERS - classes * (maps + 3)) // (2 * classes + 1))
    return launching.cdiv(2**maps - 1, launching.cdiv(2**maps - 1, most))


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
