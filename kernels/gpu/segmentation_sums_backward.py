"""Triton kernels of the segmentation sums, backward: gradients of one map for `dice_ce_loss`, of n for `mutation_loss`.

Programs walk over the pixels as in the forward pass, and recompute the softmaxes. The gradient of a map at full size is
written where it arises. That of a coarse map is folded down its columns first, in registers: while a program walks, two
sums per thread, class and map collect what belongs to the two coarse rows around the current row, and a coarse row is
written when the walk has passed it. A second kernel, one thread for a coarse cell, adds up the rows of the programs
that touched it, and folds them along the row. No atomics, no full-resolution gradient, and a fixed order: results
repeat bit for bit.

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
from .segmentation_sums import STEPS, TILE, WARP_SIZE, Walk, all_logits, between, labels, softmax, walk_key

BACKWARD_CHOICES = ({"steps": STEPS}, {"steps": 8}, {"steps": 32})  # tiles that a program walks over


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
            sum_grads, maps, strides, sizes, target, target_strides, sample, row, columns, exists, rows, width, IGNORED,
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
                first, _unused = between(top, rows, sizes[2 * i])
                current, share = between(row, rows, sizes[2 * i])
                following, _unused = between(row + 1, rows, sizes[2 * i])
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
    sum_grads, maps, strides, sizes, target, target_strides, sample, row, columns, exists, rows, width, IGNORED,
    N: tl.constexpr, K: tl.constexpr, SUBSETS: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """Return N * K vectors: the gradients of the logits at some pixels of a row."""
    label, counts, wrong = labels(target, target_strides, sample, row, columns, exists, IGNORED, K)
    weight = tl.where(wrong, float("nan"), tl.where(counts, 1.0, 0.0))
    logits = all_logits(maps, strides, sizes, sample, row, columns, exists, rows, width, N, K)
    found = ()
    for _j in tl.static_range(N * K):
        found = found + (tl.zeros_like(weight),)
    for s in range(SUBSETS):
        members = ()
        for i in tl.static_range(N):
            members = members + (((s + 1) >> i) & 1,)
        p, _missed = softmax(logits, label, members, N, K)
        start = sum_grads + (sample * SUBSETS + s) * (2 * K + 1)
        of_nll = tl.load(start + 2 * K)
        along = tl.zeros_like(weight)  # sum_k p_k dL/dp_k
        for k in tl.static_range(K):
            slope = tl.load(start + K + k)
            if SQUARED:
                slope = slope * p[k]
            along += p[k] * (slope + tl.where(label == k, tl.load(start + k), 0.0))
        added = ()
        for k in tl.static_range(K):
            slope = tl.load(start + K + k)
            if SQUARED:
                slope = slope * p[k]
            slope += tl.where(label == k, tl.load(start + k), 0.0)
            grad = p[k] * (slope - along + of_nll) - tl.where(label == k, of_nll, 0.0)
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
        first, _ = between(top, height, coarse_height)
        last, _ = between(tl.minimum(top + STEPS, height) - 1, height, coarse_height)
        touched = real & (strip < strips) & (first <= row) & (row <= last + 1)
        start = ((plane // K * strips + strip) * folded + row - first) * K + plane % K
        for pixel_step in range(REACH_ACROSS):
            pixel = left + pixel_step
            near, share = between(pixel, width, coarse_width)
            weight = tl.where(near == column, 1 - share, tl.where(near + 1 == column, share, 0.0))
            inside = touched & (pixel < width) & (weight > 0)
            total += weight * tl.load(partial + start * width + pixel, mask=inside, other=0.0)
    tl.store(grad + cell, total.to(grad.dtype.element_ty), mask=real)


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
    classes, subsets = maps[0].shape[1], 2 ** len(maps) - 1
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
            SUBSETS=subsets,
            SQUARED=squared,
            STEPS=walk.steps,
            TILE=TILE,
            num_warps=TILE // WARP_SIZE,
        )
        for result, partial, folded in zip(results, written, walk.folded, strict=True):
            if result is not None and partial is not None and folded:
                _fold(partial, result, target.shape[1:], folded, walk.steps)
    return [result for result in results if result is not None]


def _fold(partial: Tensor, grad: Tensor, full: Sequence[int], folded: int, steps: int) -> None:
    (height, width), (coarse_height, coarse_width) = full, grad.shape[2:]
    launching.launch(
        _fold_rows_kernel,
        (launching.cdiv(grad.numel(), TILE),),
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
        STEPS=steps,
        REACH_DOWN=launching.cdiv(2 * height // coarse_height + 5, steps) + 1,
        REACH_ACROSS=2 * width // coarse_width + 5,
        TILE=TILE,
        num_warps=TILE // WARP_SIZE,
    )
