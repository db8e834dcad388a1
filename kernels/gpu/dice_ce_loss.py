"""Triton kernels of the segmentation sums, forward: for one map the sums of `dice_ce_loss`, for n of `mutation_loss`.

A thread owns one pixel at a time: it reads, or interpolates, the logits of all maps and classes into registers, takes
their exponentials once, each relative to its map's maximum, and multiplies these for every subset. A tile is TILE
pixels of one row; a program walks down some rows of one sample. Where no map is coarse, the pixels are not rows but one
line, cut into rows of TILE pixels.

A subset's sums stay in registers during the walk, and each program writes one partial sum; as many subsets as registers
allow share a launch. Where maps disagree so far that a product of exponentials underflows, a second launch takes
exponentials of the sums themselves; its programs end at once where the first found nothing too small. No atomics, and a
fixed order: results repeat bit for bit.

A class that does not exist is never used as an address; its pixel's surprise is NaN.
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
REGISTERS = 140  # sums and exponentials of one thread in the forward pass
SMALLEST_TOTAL = tl.constexpr(1e-25)  # a smaller product of exponentials may have lost classes that matter


@triton.jit
def between(position, full, size):
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
        top, below = between(row, rows, sizes[2 * I])
        left, beside = between(columns, width, sizes[2 * I + 1])
        upper_row = top.to(tl.int64) * strides[4 * I + 2]
        lower_row = tl.minimum(top + 1, sizes[2 * I] - 1).to(tl.int64) * strides[4 * I + 2]
        near = left.to(tl.int64) * strides[4 * I + 3]
        beyond = tl.minimum(left + 1, sizes[2 * I + 1] - 1).to(tl.int64) * strides[4 * I + 3]
        for k in tl.static_range(K):
            plane = start + tl.full((), k, tl.int64) * strides[4 * I + 1]
            upper = tl.load(plane + upper_row + near, mask=exists, other=0.0).to(tl.float32) * (1 - beside)
            upper += tl.load(plane + upper_row + beyond, mask=exists, other=0.0).to(tl.float32) * beside
            lower = tl.load(plane + lower_row + near, mask=exists, other=0.0).to(tl.float32) * (1 - beside)
            lower += tl.load(plane + lower_row + beyond, mask=exists, other=0.0).to(tl.float32) * beside
            found = found + (upper * (1 - below) + lower * below,)
        tl.debug_barrier()  # or the compiler loads all maps before it uses one, and runs out of registers
    return found


@triton.jit
def all_logits(maps, strides, sizes, sample, row, columns, exists, rows, width, N: tl.constexpr, K: tl.constexpr):
    """Return N * K vectors."""
    found = ()
    for i in tl.static_range(N):
        found = found + _logits(maps, strides, sizes, sample, row, columns, exists, rows, width, i, K)
    return found


@triton.jit
def shifted(logits, label, N: tl.constexpr, K: tl.constexpr):
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
def near_softmax(exponentials, reached, SUBSET: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
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
    missed = tl.log(tl.maximum(total, SMALLEST_TOTAL, propagate_nan=tl.PropagateNan.ALL))
    for i in tl.static_range(N):
        if (SUBSET >> i) & 1:
            missed -= reached[i]
    return p, total, missed


@triton.jit
def far_softmax(logits, label, members, N: tl.constexpr, K: tl.constexpr):
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
def labels(target, strides, sample, row, columns, exists, IGNORED, K: tl.constexpr):
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
        label, counts, wrong = labels(target, target_strides, sample, row, columns, exists, IGNORED, K)
        weight = tl.where(counts, 1.0, 0.0)
        logits = all_logits(maps, strides, sizes, sample, row, columns, exists, rows, width, N, K)
        if not FAR:
            logits, reached = shifted(logits, label, N, K)
        added = ()
        for s in tl.static_range(COUNT):
            if FAR:
                members = ()
                for i in tl.static_range(N):
                    members = members + (((FIRST + s + 1) >> i) & 1,)
                p, total, missed = far_softmax(logits, label, members, N, K)
            else:
                p, total, missed = near_softmax(logits, reached, FIRST + s + 1, N, K)
                smallest = tl.minimum(smallest, total)
                total = tl.maximum(total, SMALLEST_TOTAL, propagate_nan=tl.PropagateNan.ALL)
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


def forward(
    maps: Sequence[Tensor], target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel; return overlap (B, S, K), predicted (B, S, K), surprise (B, S) and true (B, K)."""
    walk = Walk(maps, target)
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


def subsets_per_launch(maps: int, classes: int) -> int:
    """Return how many subsets share a launch: as many as fit a thread's registers, in groups as even as possible."""
    most = max(1, (REGISTERS - classes * (maps + 2)) // (2 * classes + 1))
    return triton.cdiv(2**maps - 1, triton.cdiv(2**maps - 1, most))


class Walk:
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


# ------------------------------------------------------------------------------------------- the ahead-of-time gate


def budgets(registers: tuple[int, ...], shuffles: int) -> dict[str, Budget]:
    """A pixel per thread: a warp's loads are whole lines of memory, though each thread's part of it is small."""
    return {
        target: Budget(registers=most, wide_loads=0, shuffles=shuffles)
        for target, most in zip(TARGETS, registers, strict=True)
    }


def sums_case(
    kernel: object, maps: int, classes: int, dtype: str, *, coarse: bool, far: bool = False, registers: tuple[int, ...]
) -> StaticCase:
    """Return a case of the forward kernel, or of the backward kernel of `mutation_loss`, which reads the same."""
    backward = kernel is not _segmentation_sums_fwd_kernel
    subsets = 2**maps - 1
    count = min(subsets, subsets_per_launch(maps, classes))
    sums = 1 if backward else count * (2 * classes + 1) + classes + 1  # over the threads of a program
    reads: dict[str, str | tuple[str, ...]] = {
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
        switches: dict[str | tuple[int, ...], object] = {
            "N": maps,
            "K": classes,
            "SUBSETS": subsets,
            "SQUARED": True,
            "STEPS": STEPS,
            "TILE": TILE,
        }
    else:
        signature = {**reads, **dict.fromkeys(("partial", "partial_true", "least"), "*fp32"), **geometry}
        switches = {"N": maps, "K": classes, "FIRST": 0, "COUNT": count, "SUBSETS": subsets}
        switches |= {"SQUARED": True, "FAR": far, "STEPS": STEPS, "TILE": TILE}
    place = {name: position for position, name in enumerate(signature)}
    constants: dict[str | tuple[int, ...], object] = {"IGNORED": None, **switches}
    contiguous = [(place["strides"], 4 * i + 3) for i in range(maps)] + [(place["target_strides"], 2)]
    constants |= dict.fromkeys(contiguous, 1)
    if not coarse:
        constants |= dict.fromkeys([(place["sizes"], i) for i in range(2 * maps)])
    return StaticCase(
        name=f"{maps} {'coarse' if coarse else 'full'} maps, {dtype}, {'far' if far else 'near'}",
        kernel=kernel,
        signature={**signature, **dict.fromkeys(map(str, switches), "constexpr")},
        constants=constants,
        aligned=("maps", "target", "partial", "partial_true", "slopes", "grads"),
        budgets=budgets(registers, shuffles=7 * sums),
        threads=TILE,
    )


# Registers: most per thread on sm_80, sm_90, sm_100, sm_120 and gfx942.
STATIC_CASES = [
    sums_case(_segmentation_sums_fwd_kernel, 1, 4, "fp32", coarse=False, registers=(255,) * 4 + (512,)),
    sums_case(_segmentation_sums_fwd_kernel, 3, 9, "bf16", coarse=False, registers=(255,) * 4 + (512,)),
    sums_case(_segmentation_sums_fwd_kernel, 3, 9, "fp32", coarse=True, registers=(255,) * 4 + (512,)),
    sums_case(_segmentation_sums_fwd_kernel, 3, 9, "bf16", coarse=False, far=True, registers=(255,) * 4 + (512,)),
]
