"""Triton kernels of the gradient of dilated attention for pairs of pixels.

Threads take pixels as in the forward pass, see `dilated_attention_pairs`. The first kernel has pairs of queries. It
computes the weight of each tap and the gradient of its logit, gathers dq, for which it reads the keys a second time,
and writes both numbers of each tap for the second kernel. That one has pairs of keys, which twelve queries see, and
gathers dk and dv: sums of queries and of gradients times numbers that it only has to read.

The two numbers of a tap share a word of 32 bits, as float16, which has three more digits than the maps. A weight is at
most 1. The gradient of a logit may be of any size; it is written in units of its query's largest, which is written as
well, in float32.

Where a window reaches out of the image, a thread loads its own pixel instead, and weighs it by zero: that takes fewer
instructions than to set registers to zero before each load.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* backward, B=32 H=64 W=64 C=72: 21.44 bytes per element, least 14.00; 47.0 us, floor 30.7 us
Both kernels read gradients and queries, and the numbers of the taps are written and read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dilated_attention_pairs import (
    LOG2_E,
    Strides,
    added,
    dot,
    exchanged,
    launch,
    load_pair,
    load_tap,
    moved,
    own_rows,
    place_of,
    store_channels,
    taps_of,
    tile_of,
    words_of,
    zero_channels,
)

TAPS = tl.constexpr(9)
LEAST_UNIT = tl.constexpr(2.0**-126)  # whose reciprocal is finite


@triton.jit
def _inside(taps):
    """Put each tap that is outside of the image where the pixel itself is."""
    steps = ()
    for t in tl.static_range(len(taps[0])):
        steps = steps + (tl.where(taps[1][t], taps[0][t], 0),)
    return steps, taps[1]


@triton.jit
def _factors_of(factors, here, number, tap, height, width, HEADS: tl.constexpr):
    """Return pointers to both numbers of a tap of each query in (B, HEADS, TAPS, height, width, 2), (PIXELS, 2).

    The query's own number already counts one plane per head.
    """
    planes = (here[0] * HEADS + here[3]) * (TAPS - 1) + tap
    return factors + (number + planes * height * width)[:, None] * 2 + tl.arange(0, 2)[None, :]


@triton.jit
def _store_pair(x, strides, here, own, sums, factor, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Store both pixels of each pair, times a factor."""
    tile = tile_of(x, strides, here, D, CHUNK, UNIT)
    for r in tl.static_range(2):
        store_channels(moved(tile, own[0][r], 0, strides, UNIT), sums[r], factor, own[1][r], D, CHUNK)


@triton.jit
def _dilated_attention_dq_pairs_kernel(
    maps,  # grad, q, k, v, and the gradient of q or None where it is not asked for: (B, height, width, HEADS * D)
    strides,
    normaliser,  # (B, HEADS, height, width) float32
    factors,  # (B, HEADS, 9, height, width, 2) float16: of each tap, its weight and its logit's gradient, or None
    units,  # (B, HEADS, height, width) float32: in which these gradients are written, or None
    height,
    width,
    tiles,
    scale,
    LAYOUTS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DILATIONS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):
    here, dilation, number, exists, any_exists = place_of(height, width, tiles, HEADS, DILATIONS, PIXELS)
    if not any_exists:
        return
    grad_strides, q_strides = strides[LAYOUTS[0]], strides[LAYOUTS[1]]
    k_strides, v_strides = strides[LAYOUTS[2]], strides[LAYOUTS[3]]
    own = own_rows(here[1], height, dilation, exists)
    rows = _inside(taps_of(here[1], height, dilation, exists, 4))
    columns = _inside(taps_of(here[2], width, dilation, exists, 3))
    value_tile = words_of(maps[3], v_strides, here, D, CHUNK, UNIT)
    grads = load_pair(words_of(maps[0], grad_strides, here, D, CHUNK, UNIT), grad_strides, own, D, CHUNK, UNIT)
    weight_grads = ()
    for t in tl.static_range(12):
        values = load_tap(value_tile, v_strides, rows, columns, None, t, D, CHUNK, UNIT)
        for r in tl.static_range(2):
            weight_grad = 0.0
            if r <= t // 3 and t // 3 <= r + 2:
                weight_grad = dot(grads[r], values)
            weight_grads = weight_grads + (weight_grad,)
    # dq = scale sum_t p[t] (<grad, value[t]> - mean) key[t], where mean = sum_t p[t] <grad, value[t]>: keys are read
    # twice, as the mean is known only after the last tap. Keys and values outside of the image are zeros, and what they
    # add is zero as if their weights were.
    key_tile = words_of(maps[2], k_strides, here, D, CHUNK, UNIT)
    queries = load_pair(words_of(maps[1], q_strides, here, D, CHUNK, UNIT), q_strides, own, D, CHUNK, UNIT)
    norms, weights, means = (), (), (tl.zeros((PIXELS,), dtype=tl.float32),) * 2
    for r in tl.static_range(2):
        norms = norms + (tl.load(normaliser + number + own[0][r] * width),)
    for t in tl.static_range(12):
        keys = load_tap(key_tile, k_strides, rows, columns, None, t, D, CHUNK, UNIT)
        for r in tl.static_range(2):
            weight = 0.0
            if r <= t // 3 and t // 3 <= r + 2:
                weight = tl.exp2(dot(queries[r], keys) * (scale * LOG2_E) - norms[r])
                weight = tl.where(rows[1][t // 3] & columns[1][t % 3], weight, 0.0)
                means = exchanged(means, r, tl.fma(weight, weight_grads[t * 2 + r], means[r]))
            weights = weights + (weight,)
    logit_grads, largest = (), (tl.full((PIXELS,), LEAST_UNIT, dtype=tl.float32),) * 2
    for t in tl.static_range(12):
        for r in tl.static_range(2):
            logit_grad = 0.0
            if r <= t // 3 and t // 3 <= r + 2:
                logit_grad = weights[t * 2 + r] * (weight_grads[t * 2 + r] - means[r])
                largest = exchanged(largest, r, tl.maximum(largest[r], tl.abs(logit_grad)))
            logit_grads = logit_grads + (logit_grad,)
    if factors is not None:
        for r in tl.static_range(2):
            query = number + own[0][r] * width
            tl.store(units + query, largest[r], mask=own[1][r])
            inverse = 1.0 / largest[r]
            for tap in tl.static_range(TAPS):
                both = tl.join(weights[(r * 3 + tap) * 2 + r], logit_grads[(r * 3 + tap) * 2 + r] * inverse)
                place = _factors_of(factors, here, query, tap, height, width, HEADS)
                tl.store(place, both.to(tl.float16), mask=own[1][r][:, None])
    if maps[4] is not None:
        sums = (zero_channels(PIXELS, D, CHUNK),) * 2
        for t in tl.static_range(12):
            keys = load_tap(key_tile, k_strides, rows, columns, None, t, D, CHUNK, UNIT)
            for r in tl.static_range(2):
                if r <= t // 3 and t // 3 <= r + 2:
                    sums = exchanged(sums, r, added(sums[r], logit_grads[t * 2 + r], keys))
        _store_pair(maps[4], strides[LAYOUTS[4]], here, own, sums, scale, D, CHUNK, UNIT)


@triton.jit
def _dilated_attention_dkdv_pairs_kernel(
    maps,  # grad, q, and the gradients of k and v or None where they are not asked for
    strides,
    factors,  # (B, HEADS, 9, height, width, 2) float16, of the other kernel
    units,  # (B, HEADS, height, width) float32, of the other kernel
    height,
    width,
    tiles,
    scale,
    LAYOUTS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DILATIONS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):
    here, dilation, number, exists, any_exists = place_of(height, width, tiles, HEADS, DILATIONS, PIXELS)
    if not any_exists:
        return
    grad_strides, q_strides = strides[LAYOUTS[0]], strides[LAYOUTS[1]]
    own = own_rows(here[1], height, dilation, exists)
    rows = _inside(taps_of(here[1], height, dilation, exists, 4))
    columns = _inside(taps_of(here[2], width, dilation, exists, 3))
    logit_grads, sums = (), (zero_channels(PIXELS, D, CHUNK),) * 2
    grad_tile = words_of(maps[0], grad_strides, here, D, CHUNK, UNIT)
    for t in tl.static_range(12):
        grads = load_tap(grad_tile, grad_strides, rows, columns, None, t, D, CHUNK, UNIT)
        sees = rows[1][t // 3] & columns[1][t % 3]
        query = number + rows[0][t // 3] * width + columns[0][t % 3]
        unit = tl.load(units + query)
        for r in tl.static_range(2):
            logit_grad = 0.0
            if r <= t // 3 and t // 3 <= r + 2:
                tap = (r + 2 - t // 3) * 3 + 2 - t % 3  # a key lies below the query that lies above it
                place = _factors_of(factors, here, query, tap, height, width, HEADS)
                weight, share = tl.split(tl.load(place, mask=sees[:, None], other=0.0).to(tl.float32))
                sums = exchanged(sums, r, added(sums[r], weight, grads))
                logit_grad = share * unit
            logit_grads = logit_grads + (logit_grad,)
    if maps[3] is not None:
        _store_pair(maps[3], strides[LAYOUTS[3]], here, own, sums, 1.0, D, CHUNK, UNIT)
    if maps[2] is not None:
        sums = (zero_channels(PIXELS, D, CHUNK),) * 2
        query_tile = words_of(maps[1], q_strides, here, D, CHUNK, UNIT)
        for t in tl.static_range(12):
            queries = load_tap(query_tile, q_strides, rows, columns, None, t, D, CHUNK, UNIT)
            for r in tl.static_range(2):
                if r <= t // 3 and t // 3 <= r + 2:
                    sums = exchanged(sums, r, added(sums[r], logit_grads[t * 2 + r], queries))
        _store_pair(maps[2], strides[LAYOUTS[2]], here, own, sums, scale, D, CHUNK, UNIT)


def backward(
    maps: Sequence[Tensor | None], strides: Strides, normaliser: Tensor, scale: float, settings: Mapping[str, Any]
) -> None:
    """Launch the kernels on the incoming gradient, q, k, v, and those of their gradients that are asked for."""
    grad, q, k, v, q_grad, k_grad, v_grad = zip(maps, strides, strict=True)
    factors = units = None
    if gathers := k_grad[0] is not None or v_grad[0] is not None:
        samples, heads, height, width = normaliser.shape
        factors = normaliser.new_empty((samples, heads, TAPS.value, height, width, 2), dtype=torch.float16)
        units = torch.empty_like(normaliser)
    for kernel, needed, numbers, used in (
        (_dilated_attention_dq_pairs_kernel, True, (normaliser, factors, units), (grad, q, k, v, q_grad)),
        (_dilated_attention_dkdv_pairs_kernel, gathers, (factors, units), (grad, q, k_grad, v_grad)),
    ):
        if needed:
            tensors, steps = zip(*used, strict=True)
            launch(kernel, tensors, steps, numbers, normaliser.shape, scale, settings)
