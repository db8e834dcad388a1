"""Triton kernels of the segmentation sums, forward: for one map the sums of `dice_ce_loss`, for n of `mutation_loss`.

Programs walk down the rows of all maps: see `logit_rows`. A thread has the logits of all maps and classes of a pixel in
registers, and adds them up for every subset, relative to whose maximum it takes exponentials. (The maps' own
exponentials, multiplied, would be fewer, but underflow where maps disagree.)

A subset's sums stay in registers during the walk, and each warp writes one partial sum; a last launch adds these up for
each sample. Which of the first UNROLLED maps belong to a subset is known when the kernel is compiled: as many as
registers allow. The further ones belong by the number of the program, whose neighbour, for other subsets, finds the
logits in a cache. Coarse maps are small enough to be read twice: one of them more is unrolled, and the subsets that it
belongs to are a second launch's. Logarithms are taken of the product of the exponentials' sums during a walk. No
atomics, and a fixed order: results repeat bit for bit.

A class that does not exist is never used as an address; its pixel's nll is NaN.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=24 K=9 H=224 W=224 N=1: 2.89 bytes per element, least 2.89; 7.3 us, floor 7.3 us; exponentials 3.0 us
* forward, B=24 K=9 H=224 W=224 N=3: 2.30 bytes per element, least 2.30; 17.4 us, floor 17.4 us; exponentials 21.1 us
The labels' 8 bytes are shared by the classes and maps of a pixel. All subsets are read in one launch. Exponentials bind
where seven subsets need 63 of them a pixel; maps' own exponentials, multiplied, would be 27.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .logit_rows import (
    TILE,
    WARPS,
    Walk,
    added,
    before_first_row,
    centre_of,
    coarse_row,
    full_row,
    labels,
    last_column,
    past_a_coarse_row,
    walk_key,
)

FORWARD_CHOICES = ({"steps": 32}, {"steps": 16}, {"steps": 8})  # tiles that a program walks over
STEPS = FORWARD_CHOICES[0]["steps"]
ADDED_ROWS, ADDED_COLUMNS = 32, 32  # of the tile in which the programs' sums are added up
REGISTERS = 150  # for the sums, logits and slopes of a thread; where these take many more, some compilers spill
LARGEST_EXPONENT = 120  # of two, in a product of the exponentials' sums, each at most the number of classes
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _next_row(
    numbers, logits, slopes, maps, strides, sizes, sample, row, columns, rows, width, N: tl.constexpr, K: tl.constexpr
):
    """Return the state of a walk at a row, from that at the row before."""
    new_numbers = ()
    new_logits = ()
    new_slopes = ()
    for i in tl.static_range(N):
        number = numbers[i]
        slope = slopes[i * K : i * K + K]
        if sizes[2 * i] is None:
            values = full_row(maps, strides, sample, row, columns, i, K)
        else:
            values = added(logits[i * K : i * K + K], slope, K)
            centre = centre_of(row, rows, sizes[2 * i])
            while centre >= number + 1.0:
                number += 1.0
                below = coarse_row(maps, strides, sizes, sample, number + 1.0, columns, width, i, K)
                values, slope = past_a_coarse_row(values, slope, below, centre - number, sizes[2 * i] * 1.0 / rows, K)
        new_numbers = new_numbers + (number,)
        new_logits = new_logits + values
        new_slopes = new_slopes + slope
    return new_numbers, new_logits, new_slopes


@triton.jit
def of_subset(values, group, S: tl.constexpr, UNROLLED: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Return K vectors: the sums of a subset's members, of K values of each map.

    Bits of S tell which of the first UNROLLED maps are its members, and those of ``group`` which of the others.
    """
    found = ()
    for k in tl.static_range(K):
        value = None
        for i in tl.static_range(UNROLLED, N):
            member = tl.where((group >> (i - UNROLLED)) & 1 != 0, values[i * K + k], 0.0)
            value = member if value is None else value + member
        for i in tl.static_range(UNROLLED):
            if (S >> i) & 1:
                value = values[i * K + k] if value is None else value + values[i * K + k]
        found = found + (value,)
    return found


@triton.jit
def exponentials(logits, K: tl.constexpr):
    """Return K exponentials relative to the largest logit, one over their sum, the sum, and log2 of the largest."""
    largest = logits[0]
    for k in tl.static_range(1, K):
        largest = tl.maximum(largest, logits[k])
    largest *= LOG2_E
    found = ()
    total = tl.zeros_like(largest)
    for k in tl.static_range(K):
        exponential = tl.exp2(logits[k] * LOG2_E - largest)
        total = exponential if k == 0 else total + exponential
        found = found + (exponential,)
    root = tl.math.rsqrt(total)  # which takes fewer instructions than a division
    return found, root * root, total, largest


@triton.jit
def _label_logits(logits, label, wrong, N: tl.constexpr, K: tl.constexpr):
    """Return N vectors: each map's logit of the label, NaN where there is no such class."""
    found = ()
    for i in tl.static_range(N):
        value = tl.where(wrong, float("nan"), 0.0)
        for k in tl.static_range(K):
            value = tl.where(label == k, logits[i * K + k], value)
        found = found + (value,)
    return found


@triton.jit
def _with_pixels(
    intersection, predicted, distances, products, logits, reached, hot, counts, group,
    FIRST: tl.constexpr, END: tl.constexpr, UNROLLED: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    SQUARED: tl.constexpr,
):  # fmt: skip
    """Return the sums of some subsets with further pixels, of which ``reached`` has each map's logit of the label."""
    hits = ()
    sizes = ()
    missed = ()
    totals = ()
    for s in tl.static_range(FIRST, END):
        e, inverse, total, largest = exponentials(of_subset(logits, group, s, UNROLLED, N, K), K)
        inverse *= tl.where(counts, 1.0, 0.0)
        for k in tl.static_range(K):
            p = e[k] * inverse
            hits = hits + (intersection[(s - FIRST) * K + k] + hot[k] * p,)
            sizes = sizes + (predicted[(s - FIRST) * K + k] + (p * p if SQUARED else p),)
        distance = largest - of_subset(reached, group, s, UNROLLED, N, 1)[0] * LOG2_E
        missed = missed + (distances[s - FIRST] + tl.where(counts, distance, 0.0),)
        totals = totals + (products[s - FIRST] * tl.where(counts, total, 1.0),)
    return hits, sizes, missed, totals


@triton.jit
def _segmentation_sums_fwd_kernel(
    maps,  # N pointers to (B, K, h, w)
    strides,  # 4 for each map
    sizes,  # 2 for each map: its height and width, or None where they are the target's
    target,  # (B, H, W) int64
    target_strides,
    partial,  # (B, programs * WARPS, SUBSETS, 2 K + 1) float32: intersection, predicted, nll
    partial_true,  # (B, programs * WARPS, K) float32
    rows,
    width,
    pixels,  # of one sample
    tiles_across,
    strips,
    IGNORED,
    N: tl.constexpr, K: tl.constexpr,
    UNROLLED: tl.constexpr,  # maps whose membership is unrolled; that of the others is the program's number
    FIRST: tl.constexpr,  # of the subsets of these maps
    END: tl.constexpr,
    SUBSETS: tl.constexpr,  # whose sums are in memory
    SQUARED: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    programs = strips * tiles_across
    groups: tl.constexpr = 1 << (N - UNROLLED)
    group = tl.program_id(0) % groups  # neighbours read the same pixels, for other subsets
    place = (tl.program_id(0) // groups).to(tl.int64)
    sum_along_walk(
        place // programs, (place % programs).to(tl.int32), place, group, maps, strides, sizes, target, target_strides,
        partial, partial_true, rows, width, pixels, tiles_across, IGNORED, N, K, UNROLLED, FIRST, END, SUBSETS, SQUARED,
        STEPS, TILE, WARPS,
    )  # fmt: skip


@triton.jit
def sum_along_walk(
    sample, part, place, group, maps, strides, sizes, target, target_strides, partial, partial_true, rows, width,
    pixels, tiles_across, IGNORED,
    N: tl.constexpr, K: tl.constexpr, UNROLLED: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr,
    SUBSETS: tl.constexpr, SQUARED: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Write the sums of a part of a sample, those of each warp, at a place among the partial sums; see the kernel."""
    tile = (part % tiles_across) * TILE + tl.arange(0, TILE)
    top = (part // tiles_across) * STEPS
    zero = tl.zeros((TILE,), dtype=tl.float32)
    true = ()
    for _k in tl.static_range(K):
        true = true + (zero,)
    intersection = ()
    predicted = ()
    distances = ()  # from the labels' logits to the largest; the nll adds the logarithms of the exponentials' sums,
    products = ()  # which are multiplied
    for _s in tl.static_range(FIRST, END):
        intersection = intersection + true
        predicted = predicted + true
        distances = distances + (zero,)
        products = products + (zero + 1.0,)
    columns = tl.minimum(tile, last_column(top, width, pixels))
    numbers, logits, slopes = before_first_row(maps, strides, sizes, sample, top, columns, rows, width, N, K)
    end = tl.minimum(top + STEPS, rows)
    last_at_end = last_column(end - 1, width, pixels)
    for step in range(0, end - top):  # counted from the top, which takes fewer registers for addresses
        row = top + step
        last = tl.where(row == end - 1, last_at_end, width - 1)
        columns = tl.minimum(tile, last)
        label, counts, wrong = labels(target, target_strides, sample, row, columns, tile <= last, IGNORED, K)
        weight = tl.where(counts, 1.0, 0.0)
        hot = ()
        for k in tl.static_range(K):
            hot = hot + (tl.where(label == k, weight, 0.0),)
        if FIRST <= 1:  # once for all subsets
            true = added(true, hot, K)
        numbers, logits, slopes = _next_row(
            numbers, logits, slopes, maps, strides, sizes, sample, row, columns, rows, width, N, K
        )
        intersection, predicted, distances, products = _with_pixels(
            intersection, predicted, distances, products, logits, _label_logits(logits, label, wrong, N, K), hot,
            counts, group, FIRST, END, UNROLLED, N, K, SQUARED,
        )  # fmt: skip
    part_of_warp = place * WARPS + tl.arange(0, WARPS)
    first = group * (1 << UNROLLED) + FIRST
    for s in tl.static_range(END - FIRST):
        place_of = partial + (part_of_warp * SUBSETS + first + s - 1) * (2 * K + 1)
        there = first + s > 0  # which the empty subset is not
        for k in tl.static_range(K):
            _store_sums_of_warps(place_of + k, intersection[s * K + k], there, WARPS)
            _store_sums_of_warps(place_of + K + k, predicted[s * K + k], there, WARPS)
        nll = (distances[s] + tl.log2(products[s])) * LN_2
        _store_sums_of_warps(place_of + 2 * K, nll, there, WARPS)
    if FIRST <= 1:
        for k in tl.static_range(K):
            _store_sums_of_warps(partial_true + part_of_warp * K + k, true[k], group == 0, WARPS)


@triton.jit
def _store_sums_of_warps(places, values, there, WARPS: tl.constexpr):
    """Store the sum of the values of each warp's threads.

    Its first thread alone does: others' sums may differ in the last bit, where a product is fused with an addition.
    """
    lanes: tl.constexpr = values.shape[0] // WARPS
    sums = tl.sum(tl.reshape(values, (WARPS, lanes)), axis=1, keep_dims=True)
    lane = tl.arange(0, lanes)[None, :]
    tl.store(places[:, None] + lane, tl.broadcast_to(sums, (WARPS, lanes)), mask=there & (lane == 0))


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
    block = tl.program_id(0) % blocks
    add_programs(
        sample * programs, programs, sample, block, partial, partial_true, sums, true, columns, classes, ROWS, COLUMNS
    )


@triton.jit
def add_programs(
    first, programs, place, block, partial, partial_true, sums, true, columns, classes,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a block of the columns of the sums over some rows of partial sums, from the first on, at their place."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    of_sums = column < columns
    of_true = (column >= columns) & (column < columns + classes)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        row = (first + program)[:, None]
        there = (program < programs)[:, None]
        total += tl.load(partial + row * columns + column[None, :], mask=there & of_sums[None, :], other=0.0)
        of_row = partial_true + row * classes + (column - columns)[None, :]
        total += tl.load(of_row, mask=there & of_true[None, :], other=0.0)
    added = tl.sum(total, axis=0)
    tl.store(sums + place * columns + column, added, mask=of_sums)
    tl.store(true + place * classes + (column - columns), added, mask=of_true)


@tuning.tunable(FORWARD_CHOICES, lambda maps, target, *_: walk_key(maps, target))
def forward(
    choice: tuning.Choice, maps: Sequence[Tensor], target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; return intersection, predicted and nll as one, (B, S, 2 K + 1), and true (B, K)."""
    classes, subsets = maps[0].shape[1], 2 ** len(maps) - 1
    walk = Walk(maps, target, min(choice["steps"], most_steps(classes)))
    parts = walk.programs * WARPS
    partial = target.new_empty(walk.samples, parts, subsets, 2 * classes + 1, dtype=torch.float32)
    partial_true = target.new_empty(walk.samples, parts, classes, dtype=torch.float32)
    sums = target.new_empty(walk.samples, subsets, 2 * classes + 1, dtype=torch.float32)
    true = target.new_empty(walk.samples, classes, dtype=torch.float32)
    if walk.grid[0]:
        with torch.cuda.device_of(target):
            for share in shares(len(maps), classes, any(walk.folded)):
                launching.launch(
                    _segmentation_sums_fwd_kernel,
                    (walk.grid[0] << (share.maps - share.unrolled),),
                    *walk.reads_of(share.maps),
                    partial,
                    partial_true,
                    *walk.geometry,
                    ignore_index,
                    N=share.maps,
                    K=classes,
                    UNROLLED=share.unrolled,
                    FIRST=share.first,
                    END=share.end,
                    SUBSETS=subsets,
                    SQUARED=squared,
                    STEPS=walk.steps,
                    TILE=TILE,
                    WARPS=WARPS,
                    num_warps=WARPS,
                )
            launching.launch(
                _add_programs_kernel,
                (walk.samples * launching.cdiv(subsets * (2 * classes + 1) + classes, ADDED_COLUMNS),),
                partial,
                partial_true,
                sums,
                true,
                parts,
                subsets * (2 * classes + 1),
                classes,
                ROWS=ADDED_ROWS,
                COLUMNS=ADDED_COLUMNS,
                num_warps=WARPS,
            )
    else:
        sums.zero_()
        true.zero_()
    return sums, true


def most_steps(classes: int) -> int:
    """Return how many tiles a program walks over at most: the product of their exponentials' sums must be a float."""
    return int(LARGEST_EXPONENT / math.log2(max(2, classes)))


class Share(NamedTuple):
    """What one launch computes: the sums of subsets with numbers from ``first`` on, below ``end``, of unrolled maps."""

    maps: int  # that it reads
    unrolled: int  # of which membership is known when the kernel is compiled
    first: int
    end: int


@cache
def shares(maps: int, classes: int, coarse: bool) -> tuple[Share, ...]:
    """Return what each launch computes: for coarse maps, a second one has the subsets that registers do not hold.

    Full maps would be read again; there all subsets are one launch's, by the numbers of programs.
    """
    fitting = maps
    held = classes * (1 + maps * (2 if coarse else 1))
    while fitting > (maps == 1) and (2**fitting - (fitting == maps)) * (2 * classes + 2) + held > REGISTERS:
        fitting -= 1
    if fitting == maps or not coarse:
        return (Share(maps, fitting, int(fitting == maps), 2**fitting),)
    unrolled, half = fitting + 1, 2**fitting
    without = Share(fitting, fitting, 1, half) if unrolled == maps else Share(maps, unrolled, 0, half)
    return without, Share(maps, unrolled, half, 2 * half)
