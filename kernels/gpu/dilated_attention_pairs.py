"""Triton kernels of dilated attention for pairs of pixels: bfloat16, few channels, windows that are not shifted.

A thread takes two pixels, one below the other, a dilation apart. They share six of the nine places of their windows:
twelve keys are loaded and made float32 for two queries, not eighteen, for these kernels are bound by the number of
their instructions rather than by bytes. The twelve places lie in four rows, of which the first pixel sees the first
three and the second one the last three. The rows of an image come in bands of two dilations: first pixels lie in the
upper half of a band, second ones in the lower half, and where the image ends before that, there is no second.

Maps are read in words of two channels: one instruction makes a float32 of each half of a word, where a bfloat16 of its
own takes two. So even and odd channels are chunks of their own.

Backward takes two launches, as for single pixels. The one for dq reads the keys a second time, when it knows the number
that the softmax's gradient subtracts: two sums beside each other would need more registers than there are. The one for
dk and dv has one pixel per thread, for its four vectors of channels leave no room for another's.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 H=64 W=64 C=72: 8.17 bytes per element, least 8.00; 17.9 us, floor 17.6 us
* backward, B=32 H=64 W=64 C=72: 22.67 bytes per element, least 14.00; 49.8 us, floor 30.7 us
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching

MOST_CHUNKS = 3  # of 16 bytes per thread; more, and backward runs out of registers
BYTES_PER_WORD = 4
LOG2_E = tl.constexpr(1.4426950408889634)
WORD = tl.constexpr(2)  # channels, of 4 bytes together
Strides = tuple[tuple[int, ...], ...]


@triton.jit
def _place(
    height, width, tiles, HEADS: tl.constexpr, DILATIONS: tl.constexpr, EACH: tl.constexpr, PIXELS: tl.constexpr
):
    """Return where this program's first pixels are, (sample, y, x, head), and their dilation.

    Besides, their numbers in (B, HEADS, H, W), which of them exist, and whether any does. EACH thread has one pixel or
    two. The heads of one tile run side by side, for their channels share lines of the cache.
    """
    head, tile = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    sample, first = (tile // tiles).to(tl.int64), tile % tiles * PIXELS
    row, column = (first + tl.arange(0, PIXELS)) // width, (first + tl.arange(0, PIXELS)) % width
    dilation, lines, above = 0, height if EACH == 1 else 0, tl.zeros((PIXELS,), dtype=tl.int32)
    for g in tl.static_range(len(DILATIONS)):
        chosen, d = head // (HEADS // len(DILATIONS)) == g, DILATIONS[g]
        dilation += tl.where(chosen, d, 0)
        if EACH > 1:
            lines += tl.where(chosen, height // (2 * d) * d + tl.minimum(height % (2 * d), d), 0)
            above += tl.where(chosen, row // d * d, 0)
    exists, row = row < lines, row + above
    number = (sample * HEADS + head) * height * width + row * width + column
    return (sample, row, column, head), dilation, number, exists, first < lines * width


@triton.jit
def _own(row, height, dilation, exists):
    """Return how many rows each pixel of a pair lies below the first one, and which exist."""
    return (0, dilation), (exists, exists & (row + dilation < height))


@triton.jit
def _taps(position, length, dilation, exists, COUNT: tl.constexpr):
    """Return how far COUNT places, the first one before a position, lie from it, and which are in the image."""
    steps, inside = (), ()
    for t in tl.static_range(COUNT):
        step = (t - 1) * dilation
        steps, inside = steps + (step,), inside + ((position + step >= 0) & (position + step < length) & exists,)
    return steps, inside


@triton.jit
def _tile(x, strides, here, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Return pointers to the first chunk of a head at each pixel, (PIXELS, CHUNK)."""
    sample, row, column, head = here
    pixels = sample * strides[0] + row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    return x + (pixels * UNIT + head * D)[:, None] + tl.arange(0, CHUNK)[None, :]


@triton.jit
def _words(x, strides, here, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Return pointers to the words of the first chunk, (PIXELS, CHUNK / WORD)."""
    return _tile(x.to(tl.pointer_type(tl.int32)), strides, here, D // WORD, CHUNK // WORD, UNIT // WORD)


@triton.jit
def _moved(tile, rows, columns, strides, UNIT: tl.constexpr):
    """Move a tile by rows and columns; in 64 bits, as rows may lie far apart."""
    down, across = tl.cast(rows, tl.int64) * strides[1] * UNIT, tl.cast(columns, tl.int64) * strides[2] * UNIT
    return tile + down + across


@triton.jit
def _load(words, exists, D: tl.constexpr, CHUNK: tl.constexpr):
    """Load all channels of each pixel as float32, even and odd ones of each chunk; zeros where there is nothing."""
    chunks = ()
    for c in tl.static_range((D + CHUNK - 1) // CHUNK):
        mask = exists[:, None]
        if (c + 1) * CHUNK > D:
            mask = mask & (tl.arange(0, CHUNK // WORD) < (D - c * CHUNK) // WORD)[None, :]
        loaded = tl.load(words + c * (CHUNK // WORD), mask=mask, other=0)
        even, odd = loaded << 16, loaded & -65536
        chunks = chunks + (even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True))
    return chunks


@triton.jit
def _load_pair(words, strides, own, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Load both pixels of each pair."""
    pixels = ()
    for r in tl.static_range(2):
        there = _moved(words, own[0][r], 0, strides, UNIT // WORD)
        pixels = pixels + (_load(there, own[1][r], D, CHUNK),)
    return pixels


@triton.jit
def _load_tap(words, strides, rows, columns, t: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Load what lies in one of the twelve places that pairs see.

    Threads wait for each other before each row, or compilers would load ahead until no register is left.
    """
    if t % 3 == 0:
        tl.debug_barrier()
    there = _moved(words, rows[0][t // 3], columns[0][t % 3], strides, UNIT // WORD)
    return _load(there, rows[1][t // 3] & columns[1][t % 3], D, CHUNK)


@triton.jit
def _store(tile, chunks, factor, exists, D: tl.constexpr, CHUNK: tl.constexpr):
    """Store all channels of each pixel, times a factor."""
    for c in tl.static_range((D + CHUNK - 1) // CHUNK):
        mask = exists[:, None]
        if (c + 1) * CHUNK > D:
            mask = mask & (tl.arange(0, CHUNK) < D - c * CHUNK)[None, :]
        chunk = tl.interleave(chunks[2 * c] * factor, chunks[2 * c + 1] * factor)
        tl.store(tile + c * CHUNK, chunk.to(tile.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(PIXELS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Return zeros for all channels of each pixel."""
    chunks = ()
    for _ in tl.static_range((D + CHUNK - 1) // CHUNK * WORD):
        chunks = chunks + (tl.zeros((PIXELS, CHUNK // WORD), dtype=tl.float32),)
    return chunks


@triton.jit
def _dot(left, right):
    """Return the inner product over the channels of each pixel."""
    products = left[0] * right[0]
    for c in tl.static_range(1, len(left)):
        products = tl.fma(left[c], right[c], products)
    return tl.sum(products, axis=1)


@triton.jit
def _add(sums, factor, chunks):
    """Return the sums plus each pixel's factor times its channels."""
    updated = ()
    for c in tl.static_range(len(sums)):
        updated = updated + (sums[c] + factor[:, None] * chunks[c],)
    return updated


@triton.jit
def _with(items, r: tl.constexpr, item):
    """Return a pair of which one has changed."""
    return (item if r == 0 else items[0], item if r == 1 else items[1])


@triton.jit
def _dilated_attention_fwd_pairs_kernel(
    maps,  # q, k, v, out: pointers to (B, height, width, HEADS * D)
    strides,  # of each layout: of (B, height, width) in units of UNIT elements, and of the channels in elements
    normaliser,  # (B, HEADS, height, width) float32: log2 of the softmax's denominator
    height,
    width,
    tiles,  # of a sample
    scale,
    LAYOUTS: tl.constexpr,  # of each map
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DILATIONS: tl.constexpr,
    MASK: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):
    here, dilation, number, exists, any_exists = _place(height, width, tiles, HEADS, DILATIONS, 2, PIXELS)
    if not any_exists:
        return
    q_strides, k_strides, v_strides = strides[LAYOUTS[0]], strides[LAYOUTS[1]], strides[LAYOUTS[2]]
    own = _own(here[1], height, dilation, exists)
    rows = _taps(here[1], height, dilation, exists, 4)
    columns = _taps(here[2], width, dilation, exists, 3)
    tile = _words(maps[0], q_strides, here, D, CHUNK, UNIT)
    queries = _load_pair(tile, q_strides, own, D, CHUNK, UNIT)
    tile = _words(maps[1], k_strides, here, D, CHUNK, UNIT)
    logits = ()
    largest = (tl.full((PIXELS,), -float("inf"), dtype=tl.float32),) * 2
    totals = (tl.zeros((PIXELS,), dtype=tl.float32),) * 2
    for t in tl.static_range(12):
        keys = _load_tap(tile, k_strides, rows, columns, t, D, CHUNK, UNIT)
        for r in tl.static_range(2):
            logit = 0.0
            if r <= t // 3 and t // 3 <= r + 2:
                logit = _dot(queries[r], keys) * (scale * LOG2_E)
                if MASK:
                    inside = rows[1][t // 3] & columns[1][t % 3]
                    logit = tl.where(inside | (own[1][r] == 0), logit, -float("inf"))
                largest = _with(largest, r, tl.maximum(largest[r], logit))
            logits = logits + (logit,)
    tile = _words(maps[2], v_strides, here, D, CHUNK, UNIT)
    sums = (_zeros(PIXELS, D, CHUNK),) * 2
    for t in tl.static_range(12):
        values = _load_tap(tile, v_strides, rows, columns, t, D, CHUNK, UNIT)
        for r in tl.static_range(2):
            if r <= t // 3 and t // 3 <= r + 2:
                weight = tl.exp2(logits[t * 2 + r] - largest[r])
                totals = _with(totals, r, totals[r] + weight)
                sums = _with(sums, r, _add(sums[r], weight, values))
    tile = _tile(maps[3], strides[LAYOUTS[3]], here, D, CHUNK, UNIT)
    for r in tl.static_range(2):
        there = _moved(tile, own[0][r], 0, strides[LAYOUTS[3]], UNIT)
        _store(there, sums[r], tl.expand_dims(1.0 / totals[r], 1), own[1][r], D, CHUNK)
        tl.store(normaliser + number + own[0][r] * width, largest[r] + tl.log2(totals[r]), mask=own[1][r])


@triton.jit
def _dilated_attention_dq_pairs_kernel(
    maps,  # grad, q, k, v, and the gradient of q or None where it is not asked for: (B, height, width, HEADS * D)
    strides,
    normaliser,  # (B, HEADS, height, width) float32
    weighted_grad,  # (B, HEADS, height, width) float32: sum_t p[t] <grad, value[t]>
    height,
    width,
    tiles,
    scale,
    LAYOUTS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DILATIONS: tl.constexpr,
    MASK: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):
    here, dilation, number, exists, any_exists = _place(height, width, tiles, HEADS, DILATIONS, 2, PIXELS)
    if not any_exists:
        return
    grad_strides, q_strides = strides[LAYOUTS[0]], strides[LAYOUTS[1]]
    k_strides, v_strides = strides[LAYOUTS[2]], strides[LAYOUTS[3]]
    own = _own(here[1], height, dilation, exists)
    rows = _taps(here[1], height, dilation, exists, 4)
    columns = _taps(here[2], width, dilation, exists, 3)
    tile = _words(maps[0], grad_strides, here, D, CHUNK, UNIT)
    grads = _load_pair(tile, grad_strides, own, D, CHUNK, UNIT)
    tile = _words(maps[1], q_strides, here, D, CHUNK, UNIT)
    queries = _load_pair(tile, q_strides, own, D, CHUNK, UNIT)
    norms, subtracted = (), (tl.zeros((PIXELS,), dtype=tl.float32),) * 2
    for r in tl.static_range(2):
        norms = norms + (tl.load(normaliser + number + own[0][r] * width, mask=own[1][r], other=0.0),)
    # dq = scale sum_t p[t] (<grad, value[t]> - subtracted) key[t]: keys are read twice, as the number to subtract is
    # known only after the last tap.
    weights, weighted = (), ()
    key_tile = _words(maps[2], k_strides, here, D, CHUNK, UNIT)
    value_tile = _words(maps[3], v_strides, here, D, CHUNK, UNIT)
    for t in tl.static_range(12):
        keys = _load_tap(key_tile, k_strides, rows, columns, t, D, CHUNK, UNIT)
        values = _load_tap(value_tile, v_strides, rows, columns, t, D, CHUNK, UNIT)
        for r in tl.static_range(2):
            weight, product = 0.0, 0.0
            if r <= t // 3 and t // 3 <= r + 2:
                logit = _dot(queries[r], keys) * (scale * LOG2_E)
                if MASK:
                    logit = tl.where(rows[1][t // 3] & columns[1][t % 3], logit, -float("inf"))
                weight = tl.exp2(logit - norms[r])
                product = weight * _dot(grads[r], values)
                subtracted = _with(subtracted, r, subtracted[r] + product)
            weights, weighted = weights + (weight,), weighted + (product,)
    for r in tl.static_range(2):
        tl.store(weighted_grad + number + own[0][r] * width, subtracted[r], mask=own[1][r])
    if maps[4] is not None:
        sums = (_zeros(PIXELS, D, CHUNK),) * 2
        for t in tl.static_range(12):
            keys = _load_tap(key_tile, k_strides, rows, columns, t, D, CHUNK, UNIT)
            for r in tl.static_range(2):
                if r <= t // 3 and t // 3 <= r + 2:
                    factor = tl.fma(-subtracted[r], weights[t * 2 + r], weighted[t * 2 + r])
                    sums = _with(sums, r, _add(sums[r], factor, keys))
        tile = _tile(maps[4], strides[LAYOUTS[4]], here, D, CHUNK, UNIT)
        for r in tl.static_range(2):
            there = _moved(tile, own[0][r], 0, strides[LAYOUTS[4]], UNIT)
            _store(there, sums[r], scale, own[1][r], D, CHUNK)


@triton.jit
def _dilated_attention_dkdv_words_kernel(
    maps,  # grad, q, k, v, and the gradients of k and v or None where they are not asked for
    strides,
    normaliser,  # (B, HEADS, height, width) float32
    weighted_grad,  # (B, HEADS, height, width) float32, of the other kernel
    height,
    width,
    tiles,
    columns,  # 3; not a constant, so that no compiler unrolls the loop
    scale,
    LAYOUTS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DILATIONS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):
    here, dilation, number, exists, _ = _place(height, width, tiles, HEADS, DILATIONS, 1, PIXELS)
    grad_strides, q_strides = strides[LAYOUTS[0]], strides[LAYOUTS[1]]
    grad_tile = _words(maps[0], grad_strides, here, D, CHUNK, UNIT)
    query_tile = _words(maps[1], q_strides, here, D, CHUNK, UNIT)
    keys = _load(_words(maps[2], strides[LAYOUTS[2]], here, D, CHUNK, UNIT), exists, D, CHUNK)
    values = _load(_words(maps[3], strides[LAYOUTS[3]], here, D, CHUNK, UNIT), exists, D, CHUNK)
    key_grads, value_grads = _zeros(PIXELS, D, CHUNK), _zeros(PIXELS, D, CHUNK)
    rows = _taps(here[1], height, dilation, exists, 3)
    for j in range(columns):
        dx = (j - 1) * dilation
        column_sees = (here[2] + dx >= 0) & (here[2] + dx < width)
        for i in tl.static_range(3):
            dy, sees = rows[0][i], rows[1][i] & column_sees
            norm = tl.load(normaliser + number + (dy * width + dx), mask=sees, other=0.0)
            subtracted = tl.load(weighted_grad + number + (dy * width + dx), mask=sees, other=0.0)
            grads = _load(_moved(grad_tile, dy, dx, grad_strides, UNIT // WORD), sees, D, CHUNK)
            queries = _load(_moved(query_tile, dy, dx, q_strides, UNIT // WORD), sees, D, CHUNK)
            # Where no query sees this pixel, queries and gradients are zeros, and so is all that is added.
            weight = tl.exp2(_dot(queries, keys) * (scale * LOG2_E) - norm)
            key_grads = _add(key_grads, weight * (_dot(grads, values) - subtracted), queries)
            value_grads = _add(value_grads, weight, grads)
    if maps[4] is not None:
        _store(_tile(maps[4], strides[LAYOUTS[4]], here, D, CHUNK, UNIT), key_grads, scale, exists, D, CHUNK)
    if maps[5] is not None:
        _store(_tile(maps[5], strides[LAYOUTS[5]], here, D, CHUNK, UNIT), value_grads, 1.0, exists, D, CHUNK)


def serves(maps: Sequence[Tensor | None], settings: Mapping[str, Any], border: str) -> bool:
    """Tell whether the kernels of this file serve maps that others are compiled for with these settings."""
    d, chunk, unit = settings["D"], settings["CHUNK"], settings["UNIT"]
    if border == "shift" or unit == 1 or d % unit or launching.cdiv(d, chunk) > MOST_CHUNKS:
        return False
    words = [(x.dtype, x.stride(-1), x.data_ptr() % BYTES_PER_WORD) for x in maps if x is not None]
    return all(word == (torch.bfloat16, 1, 0) for word in words)


def launch(
    step: str, maps: Sequence[Tensor | None], strides: Strides, numbers: Sequence[Tensor], scale: float,
    settings: Mapping[str, Any], border: str,
) -> None:  # fmt: skip
    """Launch the kernel of a step on what its kernel for single pixels takes: maps, strides, numbers per pixel."""
    (kernel, pixels, turns), (samples, heads, height, width) = STEPS[step], numbers[0].shape
    tiles = tiles_of(height, width, settings, pixels)
    each, layouts = distinct(strides)
    arguments = (tuple(maps), each, *numbers, height, width, tiles, *turns, scale)
    constants = constants_of(step, settings, border) | {"LAYOUTS": layouts, "num_warps": settings["num_warps"]}
    launching.launch(kernel, (samples * tiles * heads,), *arguments, **constants)


def constants_of(step: str, settings: Mapping[str, Any], border: str) -> dict[str, Any]:
    """Return what the kernel of a step is compiled for, but for the layouts of its maps."""
    constants = {name: settings[name] for name in ("HEADS", "D", "DILATIONS", "PIXELS", "CHUNK", "UNIT")}
    return constants if step == "dkdv" else constants | {"MASK": border == "mask"}


def tiles_of(height: int, width: int, settings: Mapping[str, Any], per_thread: int) -> int:
    """Return how many tiles of pixels a sample and head has: those that the dilation with most rows of pairs needs."""
    bands = [(d, *divmod(height, per_thread * d)) for d in settings["DILATIONS"]]
    return launching.cdiv(max(full * d + min(rest, d) for d, full, rest in bands) * width, settings["PIXELS"])


@lru_cache(maxsize=1024)
def distinct(strides: Strides) -> tuple[Strides, tuple[int, ...]]:
    """Return each kind of strides once, and which of them each map has: what two maps share is computed once."""
    each = tuple(dict.fromkeys(strides))
    return each, tuple(each.index(one) for one in strides)


# The kernel of each step, how many pixels a thread of it has, and how often its loop turns, if it has one.
STEPS: Mapping[str, Any] = {
    "fwd": (_dilated_attention_fwd_pairs_kernel, 2, ()),
    "dq": (_dilated_attention_dq_pairs_kernel, 2, ()),
    "dkdv": (_dilated_attention_dkdv_words_kernel, 1, (3,)),
}
