"""Triton kernels of the segmentation sums, forward: for one map the sums of `dice_ce_loss`, for n of `mutation_loss`.

Programs walk down the rows of all maps: see `logit_rows`. A thread has the logits of all maps and classes of a pixel in
registers, and adds them up for every subset, relative to whose maximum it takes exponentials. (The maps' own
exponentials, multiplied, would be fewer, but underflow where maps disagree.)

A subset's sums stay in registers during the walk, and each program writes one partial sum; a second launch adds these
up for each sample. Which maps belong to a subset is known when the kernel is compiled, up to the first UNROLLED maps:
as many as registers allow. The further ones belong by the number of the program, whose neighbour, for other subsets,
finds the logits in a cache. Logarithms are taken of the product of the exponentials' sums during a walk. No atomics,
and a fixed order: results repeat bit for bit.

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
    UNROLLED: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """Return the sums of some subsets with further pixels, of which ``reached`` has each map's logit of the label."""
    first: tl.constexpr = 1 if UNROLLED == N else 0
    hits = ()
    sizes = ()
    missed = ()
    totals = ()
    for s in tl.static_range(first, 1 << UNROLLED):
        e, inverse, total, largest = exponentials(of_subset(logits, group, s, UNROLLED, N, K), K)
        inverse *= tl.where(counts, 1.0, 0.0)
        for k in tl.static_range(K):
            p = e[k] * inverse
            hits = hits + (intersection[(s - first) * K + k] + hot[k] * p,)
            sizes = sizes + (predicted[(s - first) * K + k] + (p * p if SQUARED else p),)
        distance = largest - of_subset(reached, group, s, UNROLLED, N, 1)[0] * LOG2_E
        missed = missed + (distances[s - first] + tl.where(counts, distance, 0.0),)
        totals = totals + (products[s - first] * tl.where(counts, total, 1.0),)
    return hits, sizes, missed, totals


@triton.jit
def _segmentation_sums_fwd_kernel(
    maps,  # N pointers to (B, K, h, w)
    strides,  # 4 for each map
    sizes,  # 2 for each map: its height and width, or None where they are the target's
    target,  # (B, H, W) int64
    target_strides,
    partial,  # (B, programs, subsets, 2 K + 1) float32: intersection, predicted, nll
    partial_true,  # (B, programs, K) float32
    rows,
    width,
    pixels,  # of one sample
    tiles_across,
    strips,
    IGNORED,
    N: tl.constexpr,
    K: tl.constexpr,
    UNROLLED: tl.constexpr,  # maps whose membership is unrolled; that of the others is the program's number
    SQUARED: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    programs = strips * tiles_across
    groups: tl.constexpr = 1 << (N - UNROLLED)
    FIRST: tl.constexpr = 1 if UNROLLED == N else 0  # the empty subset, which has no sums
    group = tl.program_id(0) % groups  # neighbours read the same pixels, for other subsets
    place = (tl.program_id(0) // groups).to(tl.int64)
    sample = place // programs
    part = (place % programs).to(tl.int32)
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
    for _s in tl.static_range(FIRST, 1 << UNROLLED):
        intersection = intersection + true
        predicted = predicted + true
        distances = distances + (zero,)
        products = products + (zero + 1.0,)
    columns = tl.minimum(tile, last_column(top, width, pixels))
    numbers, logits, slopes = before_first_row(maps, strides, sizes, sample, top, columns, rows, width, N, K)
    for step in range(0, tl.minimum(STEPS, rows - top)):
        row = top + step
        last = last_column(row, width, pixels)
        columns = tl.minimum(tile, last)
        label, counts, wrong = labels(target, target_strides, sample, row, columns, tile <= last, IGNORED, K)
        weight = tl.where(counts, 1.0, 0.0)
        hot = ()
        for k in tl.static_range(K):
            hot = hot + (tl.where(label == k, weight, 0.0),)
        true = added(true, hot, K)
        numbers, logits, slopes = _next_row(
            numbers, logits, slopes, maps, strides, sizes, sample, row, columns, rows, width, N, K
        )
        intersection, predicted, distances, products = _with_pixels(
            intersection, predicted, distances, products, logits, _label_logits(logits, label, wrong, N, K), hot,
            counts, group, UNROLLED, N, K, SQUARED,
        )  # fmt: skip
    sums = partial + place * (((1 << N) - 1) * (2 * K + 1))
    for s in tl.static_range(FIRST, 1 << UNROLLED):
        nll = (distances[s - FIRST] + tl.log2(products[s - FIRST])) * LN_2
        hits = intersection[(s - FIRST) * K : (s - FIRST) * K + K]
        sizes_of = predicted[(s - FIRST) * K : (s - FIRST) * K + K]
        _store_sums(sums, group * (1 << UNROLLED) + s, hits, sizes_of, nll, K)
    for k in tl.static_range(K):
        tl.store(partial_true + place * K + k, tl.sum(true[k], axis=0), mask=group == 0)


@triton.jit
def _store_sums(sums, subset, intersection, predicted, nll, K: tl.constexpr):
    """Store the sums of a subset over the threads of a program, unless it is the empty one."""
    start = sums + (subset - 1) * (2 * K + 1)
    for k in tl.static_range(K):
        tl.store(start + k, tl.sum(intersection[k], axis=0), mask=subset > 0)
        tl.store(start + K + k, tl.sum(predicted[k], axis=0), mask=subset > 0)
    tl.store(start + 2 * K, tl.sum(nll, axis=0), mask=subset > 0)


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
    classes, subsets = maps[0].shape[1], 2 ** len(maps) - 1
    walk = Walk(maps, target, min(choice["steps"], int(LARGEST_EXPONENT / math.log2(max(2, classes)))))
    partial = target.new_empty(walk.samples, walk.programs, subsets, 2 * classes + 1, dtype=torch.float32)
    partial_true = target.new_empty(walk.samples, walk.programs, classes, dtype=torch.float32)
    sums = target.new_empty(walk.samples, subsets, 2 * classes + 1, dtype=torch.float32)
    true = target.new_empty(walk.samples, classes, dtype=torch.float32)
    unrolled = unrolled_maps(len(maps), classes, any(walk.folded))
    grid = (walk.grid[0] << (len(maps) - unrolled),)
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
                UNROLLED=unrolled,
                SQUARED=squared,
                STEPS=walk.steps,
                TILE=TILE,
                num_warps=WARPS,
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
                num_warps=WARPS,
            )
    else:
        sums.zero_()
        true.zero_()
    return sums, true


@cache
def unrolled_maps(maps: int, classes: int, coarse: bool) -> int:
    """Return of how many maps the membership is unrolled: as many as registers allow for the sums of all subsets."""
    unrolled = maps
    held = classes * (1 + maps * (2 if coarse else 1))
    while unrolled > (maps == 1) and (2**unrolled - (unrolled == maps)) * (2 * classes + 2) + held > REGISTERS:
        unrolled -= 1
    return unrolled
