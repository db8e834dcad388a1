"""Triton kernels of the segmentation sums: those of `mutation_loss`, and with one map those of `dice_ce_loss`.

A thread owns one pixel at a time: it reads, or interpolates, the logits of all maps and classes into registers, takes
their exponentials once, each relative to its map's maximum, and multiplies these for every subset. Where maps disagree
so far that a product underflows, exponentials of the sums themselves are taken: by a second launch in the forward pass,
whose programs end at once where the first found nothing too small, and at the tile in the backward pass. A tile is TILE pixels of one row;
a program walks down some rows of one sample. Where no map is coarse, the pixels are not rows but one line, cut into
rows of TILE pixels.

Forward keeps a subset's sums in registers while it walks, and writes one partial sum per program; as many subsets as
registers allow share a launch. Backward recomputes the softmaxes. The gradient of a map at full size is written where
it arises. That of a coarse map is folded down its columns first, in registers: while a program walks, two sums per
thread, class and map collect what belongs to the two coarse rows around the current row, and a coarse row is written
when the walk has passed it. A second kernel, one thread for a coarse cell, adds up the rows of the programs that touched
it, and folds them along the row. No atomics, no full-resolution gradient, and a fixed order: results repeat bit for bit.

A class that does not exist is never used as an address; its pixel's surprise and gradients are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .static_case import TARGETS, Budget, StaticCase

TILE = 128  # pixels, one per thread
WARP_SIZE = 64 if torch.version.hip else 32
STEPS = 16  # tiles that a program walks over
REGISTERS = 200  # sums and exponentials of one thread in the forward pass
SMALLEST_TOTAL = tl.constexpr(1e-25)  # a smaller product of exponentials may have lost classes that matter


@triton.jit
def _between(position, full, size):
    """Return the first of the two coarse cells around a pixel, and the weight of the second."""
    centre = (position + 0.5) * ((size * 1.0) / (full * 1.0)) - 0.5
    centre = tl.minimum(tl.maximum(centre, 0.0), size - 1.0)
    first = tl.floor(centre)
    return first.to(tl.int32), centre - first


@triton.jit
def _logits(maps, strides, sizes, sample, row, columns, exists, rows, width, I: tl.constexpr, K: tl.constexpr):
    """Return K vectors: the logits of map I at some pixels of a row, 0 where there is no pixel."""
    found = ()
    start = maps[I] + sample * strides[4 * I]
    if sizes[2 * I] is None:
        places = row.to(tl.int64) * strides[4 * I + 2] + columns.to(tl.int64) * strides[4 * I + 3]
        for k in tl.static_range(K):
            value = tl.load(start + tl.full((), k, tl.int64) * strides[4 * I + 1] + places, mask=exists, other=0.0)
            found = found + (value.to(tl.float32),)
    else:
        top, below = _between(row, rows, sizes[2 * I])
        left, beside = _between(columns, width, sizes[2 * I + 1])
        bottom = tl.minimum(top + 1, sizes[2 * I] - 1).to(tl.int64) * strides[4 * I + 2]
        right = tl.minimum(left + 1, sizes[2 * I + 1] - 1).to(tl.int64) * strides[4 * I + 3]
        top_row = top.to(tl.int64) * strides[4 * I + 2]
        left_column = left.to(tl.int64) * strides[4 * I + 3]
        for k in tl.static_range(K):
            plane = start + tl.full((), k, tl.int64) * strides[4 * I + 1]
            upper = tl.load(plane + top_row + left_column, mask=exists, other=0.0).to(tl.float32) * (1 - beside)
            upper += tl.load(plane + top_row + right, mask=exists, other=0.0).to(tl.float32) * beside
            lower = tl.load(plane + bottom + left_column, mask=exists, other=0.0).to(tl.float32) * (1 - beside)
            lower += tl.load(plane + bottom + right, mask=exists, other=0.0).to(tl.float32) * beside
            found = found + (upper * (1 - below) + lower * below,)
    return found


@triton.jit
def _all_logits(maps, strides, sizes, sample, row, columns, exists, rows, width, N: tl.constexpr, K: tl.constexpr):
    """Return N * K vectors."""
    found = ()
    for i in tl.static_range(N):
        found = found + _logits(maps, strides, sizes, sample, row, columns, exists, rows, width, i, K)
    return found


@triton.jit
def _shifted(logits, label, N: tl.constexpr, K: tl.constexpr):
    """Return the exponentials relative to each map's maximum, and the label's logit below that maximum."""
    exponentials = ()
    reached = ()
    for i in tl.static_range(N):
        largest = logits[i * K]
        for k in tl.static_range(1, K):
            largest = tl.maximum(largest, logits[i * K + k], propagate_nan=tl.PropagateNan.ALL)
        below = tl.zeros_like(largest)
        for k in tl.static_range(K):
            distance = logits[i * K + k] - largest
            below = tl.where(label == k, distance, below)
            exponentials = exponentials + (tl.exp(distance),)
        reached = reached + (below,)
    return exponentials, reached


@triton.jit
def _near(exponentials, reached, SUBSET: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Return the K exponentials of one subset's sum, their total, and -log p of the label: by products."""
    p = ()
    total = tl.zeros_like(exponentials[0])
    for k in tl.static_range(K):
        exponential = tl.full(exponentials[0].shape, 1.0, tl.float32)
        for i in tl.static_range(N):
            if (SUBSET >> i) & 1:
                exponential *= exponentials[i * K + k]
        total += exponential
        p = p + (exponential,)
    missed = tl.log(total)
    for i in tl.static_range(N):
        if (SUBSET >> i) & 1:
            missed -= reached[i]
    return p, total, missed


@triton.jit
def _far(logits, label, members, N: tl.constexpr, K: tl.constexpr):
    """Return the same from the sum of the maps, each times its entry of ``members``, 1 or 0."""
    p = ()
    largest = tl.full(logits[0].shape, -float("inf"), tl.float32)
    for k in tl.static_range(K):
        summed = tl.zeros_like(logits[0])
        for i in tl.static_range(N):
            summed += tl.where(members[i] != 0, logits[i * K + k], 0.0)
        largest = tl.maximum(largest, summed, propagate_nan=tl.PropagateNan.ALL)
        p = p + (summed,)
    total = tl.zeros_like(largest)
    reached = tl.zeros_like(largest)
    exponentials = ()
    for k in tl.static_range(K):
        distance = p[k] - largest
        reached = tl.where(label == k, distance, reached)
        exponential = tl.exp(distance)
        total += exponential
        exponentials = exponentials + (exponential,)
    return exponentials, total, tl.log(total) - reached


@triton.jit
def _labels(target, strides, sample, row, columns, exists, IGNORED, K: tl.constexpr):
    """Return the class of some pixels, which of them count (1 or 0), and which have a class that does not exist."""
    places = row.to(tl.int64) * strides[1] + columns.to(tl.int64) * strides[2]
    label = tl.load(target + sample * strides[0] + places, mask=exists, other=0)
    counts = exists
    if IGNORED is not None:
        counts = counts & (label != IGNORED)
    wrong = counts & ((label < 0) | (label >= K))
    return label, counts, wrong


@triton.jit
def _segmentation_sums_fwd_kernel(
    maps,  # N pointers to (B, K, h, w)
    strides,  # 4 for each map
    sizes,  # 2 for each map: its height and width, or None where they are the target's
    target,  # (B, H, W) int64
    target_strides,
    partial,  # (B, programs, SUBSETS, 2 K + 1) float32: overlap, predicted, surprise
    partial_true,  # (B, programs, K) float32
    least,  # (B, programs) float32: the smallest total of a product's exponentials
    rows,
    width,
    pixels,  # of one sample
    tiles_across,
    strips,
    IGNORED,
    N: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,  # the first subset of this launch
    COUNT: tl.constexpr,
    SUBSETS: tl.constexpr,
    SQUARED: tl.constexpr,
    FAR: tl.constexpr,  # whether to do again, by the sums themselves, what products were too small for
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    programs = strips * tiles_across
    place = tl.program_id(0).to(tl.int64)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    columns = (part % tiles_across) * TILE + tl.arange(0, TILE)
    top = (part // tiles_across) * STEPS
    steps = tl.minimum(STEPS, rows - top)
    if FAR:
        steps = tl.where(tl.load(least + place) < SMALLEST_TOTAL, steps, 0)
    sums = ()
    for _j in tl.static_range(COUNT * (2 * K + 1) + K):
        sums = sums + (tl.zeros((TILE,), dtype=tl.float32),)
    smallest = tl.full((TILE,), float("inf"), tl.float32)
    for step in range(0, steps):
        row = top + step
        exists = (columns < width) & (row.to(tl.int64) * width + columns < pixels)
        label, counts, wrong = _labels(target, target_strides, sample, row, columns, exists, IGNORED, K)
        weight = tl.where(counts, 1.0, 0.0)
        logits = _all_logits(maps, strides, sizes, sample, row, columns, exists, rows, width, N, K)
        if not FAR:
            logits, reached = _shifted(logits, label, N, K)
        added = ()
        for s in tl.static_range(COUNT):
            if FAR:
                members = ()
                for i in tl.static_range(N):
                    members = members + (((FIRST + s + 1) >> i) & 1,)
                p, total, missed = _far(logits, label, members, N, K)
            else:
                p, total, missed = _near(logits, reached, FIRST + s + 1, N, K)
                smallest = tl.minimum(smallest, total)
            inverse = 1 / total
            for k in tl.static_range(K):
                hit = tl.where(counts & (label == k), p[k] * inverse, 0.0)
                added = added + (sums[s * (2 * K + 1) + k] + hit,)
            for k in tl.static_range(K):
                size = p[k] * inverse
                if SQUARED:
                    size *= size
                size *= weight
                added = added + (sums[s * (2 * K + 1) + K + k] + size,)
            missed = tl.where(wrong, float("nan"), tl.where(counts, missed, 0.0))
            added = added + (sums[s * (2 * K + 1) + 2 * K] + missed,)
        for k in tl.static_range(K):
            added = added + (sums[COUNT * (2 * K + 1) + k] + tl.where(counts & (label == k), 1.0, 0.0),)
        sums = added
    written = steps > 0
    for j in tl.static_range(COUNT * (2 * K + 1)):
        tl.store(partial + (place * SUBSETS + FIRST) * (2 * K + 1) + j, tl.sum(sums[j], axis=0), mask=written)
    if not FAR:
        if FIRST == 0:
            for k in tl.static_range(K):
                tl.store(partial_true + place * K + k, tl.sum(sums[COUNT * (2 * K + 1) + k], axis=0))
        tl.store(least + place, tl.min(smallest, axis=0))


@triton.jit
def _segmentation_sums_bwd_kernel(
    slopes,  # (B, SUBSETS, 2 K + 1) float32: gradients of overlap, predicted (twice if squared), and surprise
    maps,
    strides,
    sizes,
    target,
    target_strides,
    grads,  # for each map: (B, K, pixels) at full size, (B, strips, FOLDED, K, width) float32 if coarse, None if unasked
    folded,  # for each map: how many coarse rows a program may touch
    rows,
    width,
    pixels,
    tiles_across,
    strips,
    IGNORED,
    N: tl.constexpr,
    K: tl.constexpr,
    SUBSETS: tl.constexpr,
    SQUARED: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    programs = strips * tiles_across
    sample = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    columns = (part % tiles_across) * TILE + tl.arange(0, TILE)
    strip = part // tiles_across
    top = strip * STEPS
    end = tl.minimum(top + STEPS, rows)
    upper = ()  # what belongs to the coarse row above the current row, and to the one below it
    lower = ()
    for _j in tl.static_range(N * K):
        upper = upper + (tl.zeros((TILE,), dtype=tl.float32),)
        lower = lower + (tl.zeros((TILE,), dtype=tl.float32),)
    for step in range(0, end - top):
        row = top + step
        exists = (columns < width) & (row.to(tl.int64) * width + columns < pixels)
        found = _pixel_gradients(
            slopes, maps, strides, sizes, target, target_strides, sample, row, columns, exists, rows, width, IGNORED,
            N, K, SUBSETS, SQUARED,
        )  # fmt: skip
        new_upper = ()
        new_lower = ()
        for i in tl.static_range(N):
            if grads[i] is None or sizes[2 * i] is None:
                for k in tl.static_range(K):
                    if grads[i] is not None:
                        place = (sample * K + k) * pixels + row.to(tl.int64) * width + columns
                        tl.store(grads[i] + place, found[i * K + k].to(grads[i].dtype.element_ty), mask=exists)
                    new_upper = new_upper + (upper[i * K + k],)
                    new_lower = new_lower + (lower[i * K + k],)
            else:
                first, _unused = _between(top, rows, sizes[2 * i])
                current, share = _between(row, rows, sizes[2 * i])
                following, _unused = _between(row + 1, rows, sizes[2 * i])
                last = row + 1 == end
                passed = last | (following != current)
                for k in tl.static_range(K):
                    above = upper[i * K + k] + found[i * K + k] * (1 - share)
                    beneath = lower[i * K + k] + found[i * K + k] * share
                    start = ((sample * strips + strip) * folded[i] + current - first) * K + k
                    tl.store(grads[i] + start * width + columns, above, mask=exists & passed)
                    tl.store(grads[i] + (start + K) * width + columns, beneath, mask=exists & last)
                    new_upper = new_upper + (tl.where(passed, beneath, above),)
                    new_lower = new_lower + (tl.where(passed, 0.0, beneath),)
        upper = new_upper
        lower = new_lower


@triton.jit
def _pixel_gradients(
    slopes, maps, strides, sizes, target, target_strides, sample, row, columns, exists, rows, width, IGNORED,
    N: tl.constexpr, K: tl.constexpr, SUBSETS: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """Return N * K vectors: the gradients of the logits at some pixels of a row."""
    label, counts, wrong = _labels(target, target_strides, sample, row, columns, exists, IGNORED, K)
    weight = tl.where(wrong, float("nan"), tl.where(counts, 1.0, 0.0))
    logits = _all_logits(maps, strides, sizes, sample, row, columns, exists, rows, width, N, K)
    exponentials, _reached = _shifted(logits, label, N, K)
    found = ()
    for _j in tl.static_range(N * K):
        found = found + (tl.zeros_like(weight),)
    for s in range(SUBSETS):
        members = ()
        for i in tl.static_range(N):
            members = members + (((s + 1) >> i) & 1,)
        p = ()
        total = tl.zeros_like(weight)
        for k in tl.static_range(K):
            exponential = tl.full(weight.shape, 1.0, tl.float32)
            for i in tl.static_range(N):
                exponential *= tl.where(members[i] != 0, exponentials[i * K + k], 1.0)
            total += exponential
            p = p + (exponential,)
        if tl.min(total, axis=0) < SMALLEST_TOTAL:
            p, total, _missed = _far(logits, label, members, N, K)
        inverse = 1 / total
        start = slopes + (sample * SUBSETS + s) * (2 * K + 1)
        of_surprise = tl.load(start + 2 * K)
        along = tl.zeros_like(weight)  # sum_k p_k dL/dp_k
        for k in tl.static_range(K):
            slope = tl.load(start + K + k)
            if SQUARED:
                slope = slope * (p[k] * inverse)
            along += p[k] * inverse * (slope + tl.where(label == k, tl.load(start + k), 0.0))
        added = ()
        for k in tl.static_range(K):
            slope = tl.load(start + K + k)
            if SQUARED:
                slope = slope * (p[k] * inverse)
            slope += tl.where(label == k, tl.load(start + k), 0.0)
            grad = p[k] * inverse * (slope - along + of_surprise) - tl.where(label == k, of_surprise, 0.0)
            added = added + (grad * weight,)
        summed = ()
        for i in tl.static_range(N):
            for k in tl.static_range(K):
                summed = summed + (found[i * K + k] + tl.where(members[i] != 0, added[k], 0.0),)
        found = summed
    return found


@triton.jit
def _fold_rows_kernel(
    partial,  # (B, strips, folded, K, width) float32
    grad,  # (B, K, h, w)
    cells,  # B * K * h * w
    strips,
    folded,
    height,
    width,
    coarse_height,
    coarse_width,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    REACH_DOWN: tl.constexpr,  # most strips that touch one coarse row
    REACH_ACROSS: tl.constexpr,  # most pixels of a row that touch one coarse cell
    TILE: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    real = cell < cells
    column = (cell % coarse_width).to(tl.int32)
    row = (cell // coarse_width % coarse_height).to(tl.int32)
    plane = cell // coarse_width // coarse_height
    down = (height * 1.0) / (coarse_height * 1.0)
    across = (width * 1.0) / (coarse_width * 1.0)
    # One pixel or strip too early does no harm: the weights of all are looked up.
    left = tl.maximum(tl.floor((column - 0.5) * across).to(tl.int32) - 1, 0)
    first_strip = tl.maximum(tl.floor((row - 0.5) * down).to(tl.int32) - 1, 0) // STEPS
    total = tl.zeros((TILE,), dtype=tl.float32)
    for strip_step in range(REACH_DOWN):
        strip = first_strip + strip_step
        top = strip * STEPS
        first, _ = _between(top, height, coarse_height)
        last, _ = _between(tl.minimum(top + STEPS, height) - 1, height, coarse_height)
        touched = real & (strip < strips) & (first <= row) & (row <= last + 1)
        start = ((plane // K * strips + strip) * folded + row - first) * K + plane % K
        for pixel_step in range(REACH_ACROSS):
            pixel = left + pixel_step
            near, share = _between(pixel, width, coarse_width)
            weight = tl.where(near == column, 1 - share, tl.where(near + 1 == column, share, 0.0))
            inside = touched & (pixel < width) & (weight > 0)
            total += weight * tl.load(partial + start * width + pixel, mask=inside, other=0.0)
    tl.store(grad + cell, total.to(grad.dtype.element_ty), mask=real)


def forward(
    maps: Sequence[Tensor], target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel; return overlap (B, S, K), predicted (B, S, K), surprise (B, S) and true (B, K)."""
    walk = _Walk(maps, target)
    classes, subsets = maps[0].shape[1], 2 ** len(maps) - 1
    partial = target.new_empty((walk.samples, walk.programs, subsets, 2 * classes + 1), dtype=torch.float32)
    partial_true = target.new_empty((walk.samples, walk.programs, classes), dtype=torch.float32)
    least = target.new_empty((walk.samples, walk.programs), dtype=torch.float32)
    together = subsets_per_launch(len(maps), classes)
    firsts = range(0, subsets if walk.grid[0] else 0, together)
    with torch.cuda.device_of(target):
        for first, far in [(first, far) for first in firsts for far in ((False, True) if len(maps) > 1 else (False,))]:
            _segmentation_sums_fwd_kernel[walk.grid](
                *walk.reads,
                partial,
                partial_true,
                least,
                *walk.geometry,
                ignore_index,
                N=len(maps),
                K=classes,
                FIRST=first,
                COUNT=min(together, subsets - first),
                SUBSETS=subsets,
                SQUARED=squared,
                FAR=far,
                STEPS=STEPS,
                TILE=TILE,
                num_warps=TILE // WARP_SIZE,
            )
    sums = partial.sum(1)
    overlap, predicted, surprise = sums.split((classes, classes, 1), dim=2)
    return overlap.contiguous(), predicted.contiguous(), surprise.squeeze(2).contiguous(), partial_true.sum(1)


def backward(
    grads: Sequence[Tensor],
    maps: Sequence[Tensor],
    target: Tensor,
    squared: bool,
    ignore_index: int | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Launch the backward kernels; return the gradient of each map that needs one."""
    walk = _Walk(maps, target)
    classes, subsets = maps[0].shape[1], 2 ** len(maps) - 1
    of_overlap, of_predicted, of_surprise = grads
    slopes = torch.cat([of_overlap, (2 if squared else 1) * of_predicted, of_surprise.unsqueeze(2)], 2)
    results = [m.new_empty(m.shape) if need else None for m, need in zip(maps, needed, strict=True)]
    written = [
        result if result is None or not walk.folded[i] else walk.partial_rows(i, classes)
        for i, result in enumerate(results)
    ]
    if walk.grid[0] == 0:
        return [result.zero_() for result in results if result is not None]
    with torch.cuda.device_of(target):
        _segmentation_sums_bwd_kernel[walk.grid](
            slopes,
            *walk.reads,
            tuple(written),
            tuple(walk.folded),
            *walk.geometry,
            ignore_index,
            N=len(maps),
            K=classes,
            SUBSETS=subsets,
            SQUARED=squared,
            STEPS=STEPS,
            TILE=TILE,
            num_warps=TILE // WARP_SIZE,
        )
        for result, partial, folded in zip(results, written, walk.folded, strict=True):
            if result is not None and partial is not result:
                _fold(partial, result, target.shape[1:], folded)
    return [result for result in results if result is not None]


def subsets_per_launch(maps: int, classes: int) -> int:
    """Return how many subsets' sums fit a thread's registers beside the exponentials of all maps."""
    return max(1, (REGISTERS - classes * (maps + 2)) // (2 * classes + 1))


class _Walk:
    """How the programs of a launch walk over the pixels: down the rows, or along the one line that they form."""

    def __init__(self, maps: Sequence[Tensor], target: Tensor) -> None:
        self.samples, height, width = target.shape
        full = [m.shape[2:] == target.shape[1:] for m in maps]
        line = all(full) and all(x.stride(-2) == width * x.stride(-1) for x in (*maps, target))
        rows, columns = (triton.cdiv(height * width, TILE), TILE) if line else (height, width)
        across, self.strips = triton.cdiv(columns, TILE), triton.cdiv(rows, STEPS)
        self.programs = across * self.strips
        self.grid = (self.samples * self.programs,)
        self.width = width
        down = [TILE * x.stride(-1) if line else x.stride(-2) for x in (*maps, target)]
        strides = [s for m, d in zip(maps, down, strict=False) for s in (m.stride(0), m.stride(1), d, m.stride(3))]
        sizes = [None if whole else s for m, whole in zip(maps, full, strict=True) for s in m.shape[2:]]
        self.reads = (
            tuple(maps), tuple(strides), tuple(sizes), target, (target.stride(0), down[-1], target.stride(2))
        )  # fmt: skip
        self.geometry = (rows, columns, height * width, across, self.strips)
        self.folded = [
            0 if whole else triton.cdiv((STEPS - 1) * m.shape[2], height) + 3
            for m, whole in zip(maps, full, strict=True)
        ]

    def partial_rows(self, i: int, classes: int) -> Tensor:
        """Return memory for the coarse rows of map i that each program touches."""
        shape = (self.samples, self.strips, self.folded[i], classes, self.width)
        return self.reads[3].new_empty(shape, dtype=torch.float32)


def _fold(partial: Tensor, grad: Tensor, full: Sequence[int], folded: int) -> None:
    (height, width), (coarse_height, coarse_width) = full, grad.shape[2:]
    _fold_rows_kernel[(triton.cdiv(grad.numel(), TILE),)](
        partial,
        grad,
        grad.numel(),
        partial.shape[1],
        folded,
        height,
        width,
        coarse_height,
        coarse_width,
        K=grad.shape[1],
        STEPS=STEPS,
        REACH_DOWN=triton.cdiv(2 * height // coarse_height + 5, STEPS) + 1,
        REACH_ACROSS=2 * width // coarse_width + 5,
        TILE=TILE,
        num_warps=TILE // WARP_SIZE,
    )


# ------------------------------------------------------------------------------------------- the ahead-of-time gate


def _budgets(registers: tuple[int, ...], shuffles: int) -> dict[str, Budget]:
    """A pixel per thread: a warp's loads are whole lines of memory, though each thread's part of it is small."""
    return {
        target: Budget(registers=most, wide_loads=0, shuffles=shuffles)
        for target, most in zip(TARGETS, registers, strict=True)
    }


def _sums_case(
    maps: int, classes: int, dtype: str, coarse: bool, backward: bool, registers: tuple[int, ...], shuffles: int
) -> StaticCase:
    subsets = 2**maps - 1
    reads = {
        "maps": (f"*{dtype}",) * maps,
        "strides": ("i32", "i32", "i32", "constexpr") * maps,
        "sizes": ("i32" if coarse else "constexpr",) * (2 * maps),
        "target": "*i64",
        "target_strides": ("i32", "i32", "constexpr"),
    }
    geometry = dict.fromkeys(("rows", "width", "pixels", "tiles_across", "strips"), "i32") | {"IGNORED": "constexpr"}
    if backward:
        grads = {"grads": ("*fp32" if coarse else f"*{dtype}",) * maps, "folded": ("i32",) * maps}
        signature = {"slopes": "*fp32", **reads, **grads, **geometry}
        switches = {"N": maps, "K": classes, "SUBSETS": subsets, "SQUARED": True, "STEPS": STEPS, "TILE": TILE}
    else:
        signature = {**reads, **dict.fromkeys(("partial", "partial_true", "least"), "*fp32"), **geometry}
        count = subsets_per_launch(maps, classes)
        switches = {"N": maps, "K": classes, "FIRST": 0, "COUNT": min(count, subsets), "SUBSETS": subsets}
        switches |= {"SQUARED": True, "FAR": False, "STEPS": STEPS, "TILE": TILE}
    place = {name: position for position, name in enumerate(signature)}
    constants: dict[str | tuple[int, int], object] = {"IGNORED": None, **switches}
    constants |= {(place["strides"], 4 * i + 3): 1 for i in range(maps)} | {(place["target_strides"], 2): 1}
    if not coarse:
        constants |= {(place["sizes"], i): None for i in range(2 * maps)}
    return StaticCase(
        name=f"{'backward' if backward else 'forward'}, {maps} {'coarse' if coarse else 'full'} maps, {dtype}",
        kernel=_segmentation_sums_bwd_kernel if backward else _segmentation_sums_fwd_kernel,
        signature={**signature, **dict.fromkeys(switches, "constexpr")},
        constants=constants,
        aligned=("maps", "target", "partial", "partial_true", "slopes", "grads"),
        budgets=_budgets(registers, shuffles),
        threads=TILE,
    )


def _fold_case(classes: int, dtype: str, registers: tuple[int, ...]) -> StaticCase:
    numbers = ("cells", "strips", "folded", "height", "width", "coarse_height", "coarse_width")
    switches = {"K": classes, "STEPS": STEPS, "REACH_DOWN": 2, "REACH_ACROSS": 13, "TILE": TILE}
    return StaticCase(
        name=f"fold rows, {dtype}",
        kernel=_fold_rows_kernel,
        signature={
            "partial": "*fp32",
            "grad": f"*{dtype}",
            **dict.fromkeys(numbers, "i32"),
            **dict.fromkeys(switches, "constexpr"),
        },
        constants=switches,
        aligned=("partial", "grad"),
        budgets=_budgets(registers, shuffles=0),
        threads=TILE,
    )


# The last but one argument, or the last: most registers per thread on sm_80, sm_90, sm_100, sm_120 and gfx942.
STATIC_CASES = [
    _sums_case(3, 9, "bf16", False, False, (255,) * 4 + (512,), 9999),
    _sums_case(3, 9, "bf16", False, True, (255,) * 4 + (512,), 9999),
    _sums_case(3, 9, "fp32", True, False, (255,) * 4 + (512,), 9999),
    _sums_case(3, 9, "fp32", True, True, (255,) * 4 + (512,), 9999),
    _sums_case(1, 4, "fp32", False, True, (255,) * 4 + (512,), 9999),
    _fold_case(9, "fp32", (255,) * 4 + (512,)),
]
