"""Triton kernels of the segmentation sums, backward: gradients of one map for `dice_ce_loss`, of n for `mutation_loss`.

Programs walk over the pixels as in the forward pass, and recompute the softmaxes. The gradient of a map at full size is
written where it arises. That of a coarse map is folded down its columns first, in registers: while a program walks, two
sums per thread, class and map collect what belongs to the two coarse rows around the current row, and a coarse row is
written when the walk passes it. A second kernel, for all coarse maps at once, adds up the rows of the programs that
touched a coarse row, and folds them along it: some threads share a coarse cell. No atomics, no full-resolution
gradient, and a fixed order: results repeat bit for bit.

The gradients of a pixel whose class does not exist are NaN.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* backward, B=24 K=9 H=224 W=224 N=3: 4.30 bytes per element, least 4.30; 32.5 us, floor 32.5 us; exponentials 21.1 us
The labels' 8 bytes are shared by the classes and maps of a pixel. A coarse map's rows move far less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .logit_rows import (
    TILE,
    WARP_SIZE,
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
from .segmentation_sums import FORWARD_CHOICES, exponentials, of_subset

BACKWARD_CHOICES = FORWARD_CHOICES
UNROLLED = 3  # maps whose membership in a subset is unrolled, at most
FOLDED_COLUMNS = 32  # of a block of cells of a coarse row
FOLDED_BLOCKS = 4  # of one program
SHARING = 2  # threads for each coarse cell


@triton.jit
def _segmentation_sums_bwd_kernel(
    sum_grads,  # (B, SUBSETS, 2 K + 1) float32: gradients of intersection, predicted (twice if squared), and nll
    maps,
    strides,
    sizes,
    target,
    target_strides,
    grads,  # for each map: (B, K, pixels) at full size, (B, strips, FOLDED, K, width) float32 if coarse, or None
    folded,  # for each map: how many coarse rows a program may touch
    rows,
    width,
    pixels,
    tiles_across,
    strips,
    IGNORED,
    N: tl.constexpr,
    K: tl.constexpr,
    UNROLLED: tl.constexpr,  # maps whose membership is unrolled; that of the others is counted through
    SQUARED: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    programs = strips * tiles_across
    sample = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    tile = (part % tiles_across) * TILE + tl.arange(0, TILE)
    strip = part // tiles_across
    top = strip * STEPS
    columns = tl.minimum(tile, last_column(top, width, pixels))
    numbers, logits, slopes = before_first_row(maps, strides, sizes, sample, top, columns, rows, width, N, K)
    before = numbers
    upper = slopes  # zeros: what belongs to the coarse row above the current row, and to the one below it
    lower = slopes
    for step in range(0, tl.minimum(STEPS, rows - top)):
        row = top + step
        last = last_column(row, width, pixels)
        columns = tl.minimum(tile, last)
        exists = tile <= last
        label, counts, wrong = labels(target, target_strides, sample, row, columns, exists, IGNORED, K)
        numbers, logits, slopes, above, below = _next_row(
            numbers, logits, slopes, upper, lower, maps, strides, sizes, sample, row, columns, rows, width, grads,
            folded, sample * strips + strip, before, tile, exists, N, K,
        )  # fmt: skip
        found = pixel_gradients(
            sum_grads + sample * (((1 << N) - 1) * (2 * K + 1)), logits, label, counts, wrong, UNROLLED, N, K, SQUARED
        )
        upper = ()
        lower = ()
        for i in tl.static_range(N):
            share = 0.0
            if grads[i] is not None:
                if sizes[2 * i] is None:
                    place = grads[i] + sample * K * pixels + row.to(tl.int64) * width + tile
                    store_classes(place, pixels, found[i * K : i * K + K], exists, K)
                else:
                    centre = centre_of(row, rows, sizes[2 * i])
                    share = tl.minimum(tl.maximum(centre, 0.0), sizes[2 * i] - 1.0) - numbers[i]
            for k in tl.static_range(K):
                upper = upper + (above[i * K + k] + found[i * K + k] * (1.0 - share),)
                lower = lower + (below[i * K + k] + found[i * K + k] * share,)
    for i in tl.static_range(N):
        if grads[i] is not None and sizes[2 * i] is not None:
            passed = (numbers[i] - before[i]).to(tl.int64) - 1
            slot = (sample * strips + strip) * folded[i] + passed
            place = grads[i] + slot * K * width + tile
            store_classes(place, width, upper[i * K : i * K + K], tile < width, K)
            store_classes(place + K * width, width, lower[i * K : i * K + K], tile < width, K)


@triton.jit
def store_classes(place, stride, values, exists, K: tl.constexpr):
    """Store K vectors, each a stride after the one before."""
    for k in tl.static_range(K):
        tl.store(place, values[k].to(place.dtype.element_ty), mask=exists)
        place += stride


@triton.jit
def _next_row(
    numbers, logits, slopes, upper, lower, maps, strides, sizes, sample, row, columns, rows, width, grads, folded,
    place, before, tile, exists, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Return the state of a walk at a row, and the sums of gradients for two coarse rows, from those at the row before.

    A coarse row that the walk passes is stored; rows are counted from the first one, that after ``before``.
    """
    new_numbers = ()
    new_logits = ()
    new_slopes = ()
    new_upper = ()
    new_lower = ()
    for i in tl.static_range(N):
        number = numbers[i]
        slope = slopes[i * K : i * K + K]
        above = upper[i * K : i * K + K]
        below = lower[i * K : i * K + K]
        if sizes[2 * i] is None:
            values = full_row(maps, strides, sample, row, columns, i, K)
        else:
            values = added(logits[i * K : i * K + K], slope, K)
            centre = centre_of(row, rows, sizes[2 * i])
            while centre >= number + 1.0:
                if grads[i] is not None:
                    passed = (number - before[i]).to(tl.int64) - 1
                    slot = grads[i] + (place * folded[i] + passed) * K * width + tile
                    store_classes(slot, width, above, exists & (passed >= 0), K)
                number += 1.0
                beneath = coarse_row(maps, strides, sizes, sample, number + 1.0, columns, width, i, K)
                values, slope = past_a_coarse_row(
                    values, slope, beneath, centre - number, sizes[2 * i] * 1.0 / rows, K
                )  # fmt: skip
                above = below
                below = ()
                for k in tl.static_range(K):
                    below = below + (tl.zeros_like(values[k]),)
        new_numbers = new_numbers + (number,)
        new_logits = new_logits + values
        new_slopes = new_slopes + slope
        new_upper = new_upper + above
        new_lower = new_lower + below
    return new_numbers, new_logits, new_slopes, new_upper, new_lower


@triton.jit
def pixel_gradients(
    sum_grads, logits, label, counts, wrong,
    UNROLLED: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """Return N * K vectors: the gradients of the logits at some pixels.

    With p_k = e_k / total, and for each subset the gradient of a logit is p_k (slope_k - sum_j p_j slope_j), where the
    slope of the label's class has a part of its own, which is added up for each map, and at last once for all subsets.
    """
    weight = tl.where(wrong, float("nan"), tl.where(counts, 1.0, 0.0))
    hot = ()
    for k in tl.static_range(K):
        hot = hot + (tl.where(label == k, 1.0, 0.0),)
    class_of = tl.minimum(tl.maximum(label, 0), K - 1)
    found = ()  # for each map that of the classes, and that of the label
    for _j in tl.static_range(N * (K + 1)):
        found = found + (tl.zeros_like(weight),)
    for group in range(1 << (N - UNROLLED)):
        for s in tl.static_range(1 if UNROLLED == N else 0, 1 << UNROLLED):
            e, inverse, _total, _largest = exponentials(of_subset(logits, group, s, UNROLLED, N, K), K)
            inverse *= weight
            start = sum_grads + tl.maximum(group * (1 << UNROLLED) + s - 1, 0) * (2 * K + 1)
            reached = tl.zeros_like(weight)
            for k in tl.static_range(K):
                reached += e[k] * hot[k]
            of_nll = weight * tl.load(start + 2 * K)
            of_label = reached * inverse * tl.load(start + class_of) - of_nll
            along = tl.zeros_like(weight)
            slopes = ()
            for k in tl.static_range(K):
                slope = tl.load(start + K + k)
                if SQUARED:
                    slope = slope * e[k]
                along += e[k] * slope
                slopes = slopes + (slope,)
            scale = inverse * inverse if SQUARED else inverse
            along = (along * scale + of_label) * inverse
            new = ()
            for k in tl.static_range(K):
                new = new + (e[k] * (slopes[k] * scale - along),)
            found = _added_to_members(found, new + (of_label,), group, s, UNROLLED, N, K + 1)
    gradients = ()
    for i in tl.static_range(N):
        for k in tl.static_range(K):
            gradients = gradients + (found[i * (K + 1) + k] + hot[k] * found[i * (K + 1) + K],)
    return gradients


@triton.jit
def _added_to_members(values, change, group, S: tl.constexpr, UNROLLED: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Return values, K of each map, with a change of the members of a subset; as to these, see `of_subset`."""
    found = ()
    for i in tl.static_range(N):
        for k in tl.static_range(K):
            value = values[i * K + k]
            if i >= UNROLLED:
                value += tl.where((group >> (i - UNROLLED)) & 1 != 0, change[k], 0.0)
            elif (S >> i) & 1:
                value += change[k]
            found = found + (value,)
    return found


@triton.jit
def _fold_rows_kernel(
    partials,  # N pointers to (B, strips, FOLDED, K, width) float32
    grads,  # N pointers to (B, K, h, w)
    folded,  # for each of the N maps, as are the following
    heights,
    widths,
    samples,
    strips,
    rows,
    width,
    N: tl.constexpr,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of all maps, for one program
    COLUMNS: tl.constexpr,  # of a block
    SHARING: tl.constexpr,
):
    first = tl.program_id(0) * BLOCKS
    for i in tl.static_range(N):
        blocks = samples * heights[i] * tl.cdiv(widths[i], COLUMNS)
        for block in range(tl.maximum(first, 0), tl.minimum(first + BLOCKS, blocks)):
            _fold_block(
                block, partials[i], grads[i], folded[i], heights[i], widths[i], strips, rows, width, K, STEPS, COLUMNS,
                SHARING,
            )  # fmt: skip
        first -= blocks


@triton.jit
def _fold_block(
    block, partial, grad, folded, coarse_height, coarse_width, strips, rows, width,
    K: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr, SHARING: tl.constexpr,
):  # fmt: skip
    """Write the gradient of some cells of a coarse row: threads that share a cell take every so many pixels."""
    across = tl.cdiv(coarse_width, COLUMNS)
    column = block % across * COLUMNS + tl.arange(0, COLUMNS)
    number = block // across % coarse_height
    sample = (block // across // coarse_height).to(tl.int64)
    rows_each = (rows * 1.0) / (coarse_height * 1.0)
    first = tl.maximum(tl.floor((number - 0.5) * rows_each - 0.5), 0.0).to(tl.int32) // STEPS
    first += (tl.floor(centre_of((first + 1) * STEPS - 1, rows, coarse_height)) + 1 < number).to(tl.int32)
    last = tl.minimum(tl.ceil((number + 1.5) * rows_each).to(tl.int32) // STEPS, strips - 1)
    last -= (tl.floor(centre_of(last * STEPS, rows, coarse_height)) > number).to(tl.int32)
    pixels_each = (width * 1.0) / (coarse_width * 1.0)
    left = tl.maximum(tl.floor((column - 0.5) * pixels_each - 0.5), 0.0).to(tl.int32)
    reach = tl.maximum(tl.ceil(2 * pixels_each).to(tl.int32) + 2, 1)  # which is at least 1 anyway: for the compiler
    totals = ()
    for _k in tl.static_range(K):
        totals = totals + (tl.zeros((COLUMNS, SHARING), dtype=tl.float32),)
    for strip in range(first, last + 1):
        slot = number - tl.floor(centre_of(strip * STEPS, rows, coarse_height)).to(tl.int32)
        row = partial + ((sample * strips + strip) * folded + slot) * K * width
        for start in range(0, reach, SHARING):
            pixel = left[:, None] + start + tl.arange(0, SHARING)[None, :]
            centre = tl.minimum(tl.maximum(centre_of(pixel, width, coarse_width), 0.0), coarse_width - 1.0)
            weight = tl.where(pixel < width, tl.maximum(1.0 - tl.abs(centre - column[:, None]), 0.0), 0.0)
            place = row + pixel
            new = ()
            for k in tl.static_range(K):
                new = new + (totals[k] + weight * tl.load(place, mask=weight > 0, other=0.0),)
                place += width
            totals = new
    place = grad + (sample * K * coarse_height + number) * coarse_width + column
    for k in tl.static_range(K):
        total = tl.sum(totals[k], axis=1, keep_dims=True)
        tl.store(place[:, None], total.to(grad.dtype.element_ty), mask=(column < coarse_width)[:, None])
        place += tl.full((), coarse_height, tl.int64) * coarse_width


@tuning.tunable(BACKWARD_CHOICES, lambda grad, maps, target, *_: walk_key(maps, target))
def backward(
    choice: tuning.Choice,
    grad: Tensor,
    maps: Sequence[Tensor],
    target: Tensor,
    squared: bool,
    ignore_index: int | None,
    needed: Sequence[bool],
    doubled: bool = False,
) -> list[Tensor]:
    """Launch the backward kernels on the gradient of the sums; return that of each map that needs one.

    The gradients of squares may be ``doubled`` already, as those are that `segmentation_loss.forward` returns.
    """
    walk = Walk(maps, target, choice["steps"])
    classes = maps[0].shape[1]
    sum_grads = grad.contiguous()
    if squared and not doubled:  # 2 p is the slope of a square
        sum_grads = sum_grads.clone()
        sum_grads[..., classes : 2 * classes].mul_(2)
    results = [m.new_empty(m.shape) if need else None for m, need in zip(maps, needed, strict=True)]
    written = [
        result if result is None or not walk.folded[i] else walk.partial_rows(i, classes)
        for i, result in enumerate(results)
    ]
    if walk.grid[0] == 0:
        return [result.zero_() for result in results if result is not None]
    with torch.cuda.device_of(target):
        launching.launch(
            _segmentation_sums_bwd_kernel,
            walk.grid,
            sum_grads,
            *walk.reads,
            tuple(written),
            tuple(walk.folded),
            *walk.geometry,
            ignore_index,
            N=len(maps),
            K=classes,
            UNROLLED=min(len(maps), UNROLLED),
            SQUARED=squared,
            STEPS=walk.steps,
            TILE=TILE,
            num_warps=WARPS,
        )
        each = zip(written, results, walk.folded, strict=True)
        coarse = [(partial, grad, folded) for partial, grad, folded in each if folded and partial is not None]
        if coarse:
            _fold(walk, *zip(*coarse, strict=True))
    return [result for result in results if result is not None]


def _fold(walk: Walk, partials: Sequence[Tensor], grads: Sequence[Tensor], folded: Sequence[int]) -> None:
    blocks = sum(len(grad) * grad.shape[2] * launching.cdiv(grad.shape[3], FOLDED_COLUMNS) for grad in grads)
    launching.launch(
        _fold_rows_kernel,
        (launching.cdiv(blocks, FOLDED_BLOCKS),),
        tuple(partials),
        tuple(grads),
        tuple(folded),
        tuple(grad.shape[2] for grad in grads),
        tuple(grad.shape[3] for grad in grads),
        walk.samples,
        walk.strips,
        *walk.geometry[:2],
        N=len(grads),
        K=grads[0].shape[1],
        STEPS=walk.steps,
        BLOCKS=FOLDED_BLOCKS,
        COLUMNS=FOLDED_COLUMNS,
        SHARING=SHARING,
        num_warps=FOLDED_COLUMNS * SHARING // WARP_SIZE,
    )
