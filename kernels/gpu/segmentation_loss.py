"""Triton kernel of Dice and cross-entropy: the losses of all subsets, and their slopes, from the segmentation sums.

A program has one subset, or one level of deep supervision, whose truth is its own, and whose loss counts for a share.
It reads the sums of all samples, weighs and adds them up, applies the formula, and writes the subset's loss and, for
every sample, the gradients of that loss with regard to the sums, which is all that a backward pass needs beside the
logits. The order of all sums is fixed: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* losses, B=24 K=9 S=7: 8.27 bytes per element, least 8.27; 0.0 us, floor 0.0 us
The elements are the sums, always in float32; each is read, and its slope written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning

CHOICES = ({"samples": 32}, {"samples": 64})  # that are read at once
WARPS = 4
WARP_SIZE = 64 if torch.version.hip else 32
TINY = torch.finfo(torch.float32).tiny


@triton.jit
def _sums_of(
    sums, true, weights, weight_stride, start, samples, subset,
    LEVELS: tl.constexpr, SUBSETS: tl.constexpr, K: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return intersection, sizes of both (SAMPLES, COLUMNS), nll, pixels and weight (SAMPLES,) of some samples."""
    sample = start + tl.arange(0, SAMPLES)
    k = tl.arange(0, COLUMNS)
    there = sample < samples
    real = there[:, None] & (k < K)[None, :]
    row = sums + (sample.to(tl.int64) * SUBSETS + subset) * (2 * K + 1)
    places = row[:, None] + k[None, :]
    intersection = tl.load(places, mask=real, other=0.0)
    predicted = tl.load(places + K, mask=real, other=0.0)
    of_true = true + (sample.to(tl.int64) * LEVELS + subset % LEVELS) * K
    seen = tl.load(of_true[:, None] + k[None, :], mask=real, other=0.0)
    nll = tl.load(row + 2 * K, mask=there, other=0.0)
    weight = tl.where(there, 1.0, 0.0)
    if weights is not None:
        weight = tl.load(weights + sample.to(tl.int64) * weight_stride, mask=there, other=0.0)
    return intersection, predicted + seen, nll, tl.sum(seen, axis=1), weight


@triton.jit
def _dice_ce_kernel(
    sums,  # (B, SUBSETS, 2 K + 1) float32: intersection, predicted, nll
    true,  # (B, LEVELS, K) float32
    weights,  # (B,) float32, or None where all samples count alike
    shares,  # what each level counts for, or None where there are no levels
    losses,  # (SUBSETS,) float32
    slopes,  # (B, SUBSETS, 2 K + 1) float32
    samples,
    weight_stride,
    w_ce,
    w_dice,
    best,  # what the mean Dice is taken from
    smooth,
    tiny,
    LEVELS: tl.constexpr,  # as many as subsets, or 1 where the truth is that of all subsets
    SUBSETS: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,  # class whose Dice counts, and all after it
    BATCH_DICE: tl.constexpr,
    SQUARED: tl.constexpr,
    SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    subset = tl.program_id(0)
    if shares is not None:
        of_level = shares[0]
        for level in tl.static_range(1, LEVELS):
            of_level = tl.where(subset == level, shares[level], of_level)
        w_ce *= of_level
        w_dice *= of_level
    k = tl.arange(0, COLUMNS)
    share = tl.where((k >= FIRST) & (k < K), 1.0 / (K - FIRST), 0.0)
    intersection = tl.zeros((COLUMNS,), dtype=tl.float32)
    sizes = tl.zeros((COLUMNS,), dtype=tl.float32)
    nll = 0.0
    pixels = 0.0
    counted = 0.0
    dice = 0.0
    for start in range(0, samples, SAMPLES):
        i, both, missed, seen, weight = _sums_of(
            sums, true, weights, weight_stride, start, samples, subset, LEVELS, SUBSETS, K, SAMPLES, COLUMNS
        )
        intersection += tl.sum(weight[:, None] * i, axis=0)
        sizes += tl.sum(weight[:, None] * both, axis=0)
        nll += tl.sum(weight * missed, axis=0)
        pixels += tl.sum(weight * seen, axis=0)
        counted += tl.sum(weight, axis=0)
        of_samples = tl.sum(share[None, :] * ((2 * i + smooth) / (both + smooth)), axis=1)
        dice += tl.sum(weight * of_samples, axis=0)
    pixels = tl.maximum(pixels, 1.0)
    counted = tl.maximum(counted, tiny)
    dice = dice / counted
    if BATCH_DICE:
        dice = tl.sum(share * ((2 * intersection + smooth) / (sizes + smooth)), axis=0)
    tl.store(losses + subset, w_ce * (nll / pixels) + w_dice * (best - dice))
    for start in range(0, samples, SAMPLES):
        i, both, _missed, _seen, weight = _sums_of(
            sums, true, weights, weight_stride, start, samples, subset, LEVELS, SUBSETS, K, SAMPLES, COLUMNS
        )
        of_dice = weight * w_dice
        if BATCH_DICE:
            i = tl.broadcast_to(intersection[None, :], (SAMPLES, COLUMNS))
            both = tl.broadcast_to(sizes[None, :], (SAMPLES, COLUMNS))
        else:
            of_dice = of_dice / counted
        of_intersection = of_dice[:, None] * share[None, :] * (-2 / (both + smooth))
        of_predicted = of_intersection * ((2 * i + smooth) / (both + smooth)) * -0.5
        if SQUARED:
            of_predicted *= 2  # 2 p is the slope of a square
        sample = start + tl.arange(0, SAMPLES)
        there = sample < samples
        real = there[:, None] & (k < K)[None, :]
        row = slopes + (sample.to(tl.int64) * SUBSETS + subset) * (2 * K + 1)
        tl.store(row[:, None] + k[None, :], of_intersection, mask=real)
        tl.store(row[:, None] + k[None, :] + K, of_predicted, mask=real)
        tl.store(row + 2 * K, weight * w_ce / pixels, mask=there)


@tuning.tunable(CHOICES, lambda sums, *_, **__: tuning.key_of(sums))
def forward(
    choice: tuning.Choice,
    sums: Tensor,
    true: Tensor,
    sample_weight: Tensor | None,
    *,
    first: int,
    batch_dice: bool,
    squared: bool,
    w_ce: float,
    w_dice: float,
    best: float,
    smooth: float,
    shares: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; return the loss of each subset (S,), and its gradients (B, S, 2 K + 1), squares' doubled.

    Args:
        sums: (B, S, 2 K + 1), contiguous: intersection, predicted and nll.
        true: (B, K), contiguous; (B, S, K) of levels.
        sample_weight: (B,) in float32.
        first: class whose Dice counts, and all after it.
        batch_dice: as in `trifuse.kernels.dice_ce_loss`.
        squared: whether predicted sums squares.
        w_ce: weight of the cross-entropy.
        w_dice: weight of the Dice.
        best: what the mean Dice is taken from.
        smooth: added to numerator and denominator of Dice.
        shares: what the loss of each level counts for; None where subsets are no levels.
    """
    samples, subsets, _ = sums.shape
    losses, slopes = sums.new_empty(subsets), torch.empty_like(sums)
    with torch.cuda.device_of(sums):
        launching.launch(
            _dice_ce_kernel,
            (subsets,),
            sums,
            true,
            sample_weight,
            None if shares is None else tuple(shares),
            losses,
            slopes,
            samples,
            1 if sample_weight is None else sample_weight.stride(0),
            w_ce,
            w_dice,
            best,
            smooth,
            TINY,
            LEVELS=1 if shares is None else subsets,
            SUBSETS=subsets,
            K=true.shape[-1],
            FIRST=first,
            BATCH_DICE=batch_dice,
            SQUARED=squared,
            SAMPLES=choice["samples"],
            COLUMNS=launching.next_power_of_2(true.shape[-1]),
            num_warps=WARPS * 32 // WARP_SIZE,
        )
    return losses, slopes
