"""Triton kernels of dilated attention for pairs of pixels: bfloat16, few channels, windows that are not shifted.

A thread takes two pixels, one below the other, a dilation apart. They share six of the nine places of their windows:
twelve keys are loaded and made float32 for two queries, not eighteen, for these kernels are bound by the number of
their instructions rather than by bytes. The twelve places lie in four rows, of which the first pixel sees the first
three and the second one the last three. The rows of an image come in bands of two dilations: first pixels lie in the
upper half of a band, second ones in the lower half, and where the image ends before that, there is no second.

Maps are read in words of two channels: one instruction makes a float32 of each half of a word, where a bfloat16 of its
own takes two. So even and odd channels are chunks of their own.

The gradient's kernels are those of `dilated_attention_pairs_backward`.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 H=64 W=64 C=72: 8.17 bytes per element, least 8.00; 17.9 us, floor 17.6 us
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
CONSTANTS = ("HEADS", "D", "DILATIONS", "PIXELS", "CHUNK", "UNIT")  # of the settings, that kernels are compiled for
LOG2_E = tl.constexpr(1.4426950408889634)
WORD = tl.constexpr(2)  # channels, of 4 bytes together
Strides = tuple[tuple[int, ...], ...]


@triton.jit
def place_of(height, width, tiles, HEADS: tl.constexpr, DILATIONS: tl.constexpr, PIXELS: tl.constexpr):
    """Return where this program's first pixels are, (sample, y, x, head), and their dilation.

    Besides, their numbers in (B, HEADS, H, W), which of them exist, and whether any does. The heads of one tile run
    side by side, for their channels share lines of the cache.
    """
    head, tile = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    sample, first = (tile // tiles).to(tl.int64), tile % tiles * PIXELS
    row, column = (first + tl.arange(0, PIXELS)) // width, (first + tl.arange(0, PIXELS)) % width
    dilation, lines, above = 0, 0, tl.zeros((PIXELS,), dtype=tl.int32)
    for g in tl.static_range(len(DILATIONS)):
        chosen, d = head // (HEADS // len(DILATIONS)) == g, DILATIONS[g]
        dilation += tl.where(chosen, d, 0)
        lines += tl.where(chosen, height // (2 * d) * d + tl.minimum(height % (2 * d), d), 0)
        above += tl.where(chosen, row // d * d, 0)
    exists = row < lines
    row = tl.where(exists, row + above, 0)
    number = (sample * HEADS + head) * height * width + row * width + column
    return (sample, row, column, head), dilation, number, exists, first < lines * width


@triton.jit
def own_rows(row, height, dilation, exists):
    """Return how many rows each pixel of a pair lies below the first one, and which exist; 0 for one that does not."""
    below = row + dilation < height
    return (tl.zeros_like(row), tl.where(below, dilation, 0)), (exists, exists & below)


@triton.jit
def taps_of(position, length, dilation, exists, COUNT: tl.constexpr):
    """Return how far COUNT places, the first one before a position, lie from it, and which are in the image."""
    steps, inside = (), ()
    for t in tl.static_range(COUNT):
        step = (t - 1) * dilation
        steps, inside = steps + (step,), inside + ((position + step >= 0) & (position + step < length) & exists,)
    return steps, inside


@triton.jit
def tile_of(x, strides, here, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Return pointers to the first chunk of a head at each pixel, (PIXELS, CHUNK)."""
    sample, row, column, head = here
    pixels = sample * strides[0] + row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    return x + (pixels * UNIT + head * D)[:, None] + tl.arange(0, CHUNK)[None, :]


@triton.jit
def words_of(x, strides, here, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Return pointers to the words of the first chunk, (PIXELS, CHUNK / WORD)."""
    return tile_of(x.to(tl.pointer_type(tl.int32)), strides, here, D // WORD, CHUNK // WORD, UNIT // WORD)


@triton.jit
def moved(words, rows, columns, strides, UNIT: tl.constexpr):
    """Move each pixel by rows and columns; in 64 bits, as rows may lie far apart."""
    distance = (tl.cast(rows, tl.int64) * strides[1] + tl.cast(columns, tl.int64) * strides[2]) * UNIT
    return words + (distance[:, None] if distance.type.is_block() else distance)


@triton.jit
def load_channels(words, exists, D: tl.constexpr, CHUNK: tl.constexpr):
    """Load all channels of each pixel as float32, even and odd ones of each chunk; zeros where there is nothing.

    Where something is everywhere, nobody asks whether there is.
    """
    chunks = ()
    for c in tl.static_range((D + CHUNK - 1) // CHUNK):
        mask = None if exists is None else exists[:, None]
        if (c + 1) * CHUNK > D:
            channels = (tl.arange(0, CHUNK // WORD) < (D - c * CHUNK) // WORD)[None, :]
            mask = channels if exists is None else mask & channels
        loaded = tl.load(words + c * (CHUNK // WORD), mask=mask, other=None if mask is None else 0)
        even, odd = loaded << 16, loaded & -65536
        chunks = chunks + (even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True))
    return chunks


@triton.jit
def load_pair(words, strides, own, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Load both pixels of each pair."""
    pixels = ()
    for r in tl.static_range(2):
        there = moved(words, own[0][r], 0, strides, UNIT // WORD)
        pixels = pixels + (load_channels(there, None, D, CHUNK),)
    return pixels


@triton.jit
def load_tap(
    words, strides, rows, columns, seen, t: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr
):
    """Load what lies in one of the twelve places that pairs see, where they see it; None says that all do.

    Threads wait for each other before each row, or compilers would load ahead until no register is left.
    """
    if t % 3 == 0:
        tl.debug_barrier()
    there = moved(words, rows[0][t // 3], columns[0][t % 3], strides, UNIT // WORD)
    return load_channels(there, seen, D, CHUNK)


@triton.jit
def store_channels(tile, chunks, factor, exists, D: tl.constexpr, CHUNK: tl.constexpr):
    """Store all channels of each pixel, times a factor."""
    for c in tl.static_range((D + CHUNK - 1) // CHUNK):
        mask = exists[:, None]
        if (c + 1) * CHUNK > D:
            mask = mask & (tl.arange(0, CHUNK) < D - c * CHUNK)[None, :]
        chunk = tl.interleave(chunks[2 * c] * factor, chunks[2 * c + 1] * factor)
        tl.store(tile + c * CHUNK, chunk.to(tile.dtype.element_ty), mask=mask)


@triton.jit
def zero_channels(PIXELS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Return zeros for all channels of each pixel."""
    chunks = ()
    for _ in tl.static_range((D + CHUNK - 1) // CHUNK * WORD):
        chunks = chunks + (tl.zeros((PIXELS, CHUNK // WORD), dtype=tl.float32),)
    return chunks


@triton.jit
def dot(left, right):
    """Return the inner product over the channels of each pixel."""
    products = left[0] * right[0]
    for c in tl.static_range(1, len(left)):
        products = tl.fma(left[c], right[c], products)
    return tl.sum(products, axis=1)


@triton.jit
def added(sums, factor, chunks):
    """Return the sums plus each pixel's factor times its channels."""
    updated = ()
    for c in tl.static_range(len(sums)):
        updated = updated + (sums[c] + factor[:, None] * chunks[c],)
    return updated


@triton.jit
def exchanged(items, r: tl.constexpr, item):
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
    here, dilation, number, exists, any_exists = place_of(height, width, tiles, HEADS, DILATIONS, PIXELS)
    if not any_exists:
        return
    q_strides, k_strides, v_strides = strides[LAYOUTS[0]], strides[LAYOUTS[1]], strides[LAYOUTS[2]]
    own = own_rows(here[1], height, dilation, exists)
    rows = taps_of(here[1], height, dilation, exists, 4)
    columns = taps_of(here[2], width, dilation, exists, 3)
    tile = words_of(maps[0], q_strides, here, D, CHUNK, UNIT)
    queries = load_pair(tile, q_strides, own, D, CHUNK, UNIT)
    tile = words_of(maps[1], k_strides, here, D, CHUNK, UNIT)
    logits = ()
    largest = (tl.full((PIXELS,), -float("inf"), dtype=tl.float32),) * 2
    totals = (tl.zeros((PIXELS,), dtype=tl.float32),) * 2
    for t in tl.static_range(12):
        inside = rows[1][t // 3] & columns[1][t % 3]
        keys = load_tap(tile, k_strides, rows, columns, inside, t, D, CHUNK, UNIT)
        for r in tl.static_range(2):
            logit = 0.0
            if r <= t // 3 and t // 3 <= r + 2:
                logit = dot(queries[r], keys) * (scale * LOG2_E)
                if MASK:
                    logit = tl.where(inside | (own[1][r] == 0), logit, -float("inf"))
                largest = exchanged(largest, r, tl.maximum(largest[r], logit))
            logits = logits + (logit,)
    tile = words_of(maps[2], v_strides, here, D, CHUNK, UNIT)
    sums = (zero_channels(PIXELS, D, CHUNK),) * 2
    for t in tl.static_range(12):
        inside = rows[1][t // 3] & columns[1][t % 3]
        values = load_tap(tile, v_strides, rows, columns, inside, t, D, CHUNK, UNIT)
        for r in tl.static_range(2):
            if r <= t // 3 and t // 3 <= r + 2:
                weight = tl.exp2(logits[t * 2 + r] - largest[r])
                totals = exchanged(totals, r, totals[r] + weight)
                sums = exchanged(sums, r, added(sums[r], weight, values))
    tile = tile_of(maps[3], strides[LAYOUTS[3]], here, D, CHUNK, UNIT)
    for r in tl.static_range(2):
        there = moved(tile, own[0][r], 0, strides[LAYOUTS[3]], UNIT)
        store_channels(there, sums[r], tl.expand_dims(1.0 / totals[r], 1), own[1][r], D, CHUNK)
        tl.store(normaliser + number + own[0][r] * width, largest[r] + tl.log2(totals[r]), mask=own[1][r])


def serves(maps: Sequence[Tensor | None], settings: Mapping[str, Any], border: str) -> bool:
    """Tell whether the kernels of this file serve maps that others are compiled for with these settings."""
    d, chunk, unit = settings["D"], settings["CHUNK"], settings["UNIT"]
    if border == "shift" or unit == 1 or d % unit or launching.cdiv(d, chunk) > MOST_CHUNKS:
        return False
    words = [(x.dtype, x.stride(-1), x.data_ptr() % BYTES_PER_WORD) for x in maps if x is not None]
    return all(word == (torch.bfloat16, 1, 0) for word in words)


def forward(
    maps: Sequence[Tensor], strides: Strides, normaliser: Tensor, scale: float, settings: Mapping[str, Any], border: str
) -> None:
    """Launch the kernel on q, k, v and the result, and on where to write log2 of the denominators."""
    kernel, constants = _dilated_attention_fwd_pairs_kernel, {"MASK": border == "mask"}
    launch(kernel, maps, strides, (normaliser,), normaliser.shape, scale, settings, **constants)


def launch(
    kernel: Any, maps: Sequence[Tensor | None], strides: Strides, numbers: Sequence[Tensor | None],
    shape: Sequence[int], scale: float, settings: Mapping[str, Any], **constants: object,
) -> None:  # fmt: skip
    """Launch a kernel on maps of (B, HEADS, H, W) pixels, their strides, and what it takes besides per pixel."""
    samples, heads, height, width = shape
    tiles = tiles_of(height, width, settings)
    each, layouts = distinct(strides)
    arguments = (tuple(maps), each, *numbers, height, width, tiles, scale)
    constants |= {name: settings[name] for name in CONSTANTS} | {"LAYOUTS": layouts}
    launching.launch(kernel, (samples * tiles * heads,), *arguments, **constants, num_warps=settings["num_warps"])


def tiles_of(height: int, width: int, settings: Mapping[str, Any]) -> int:
    """Return how many tiles of pairs a sample and head has: those that the dilation with most rows of them needs."""
    bands = [(d, *divmod(height, 2 * d)) for d in settings["DILATIONS"]]
    return launching.cdiv(max(full * d + min(rest, d) for d, full, rest in bands) * width, settings["PIXELS"])


@lru_cache(maxsize=1024)
def distinct(strides: Strides) -> tuple[Strides, tuple[int, ...]]:
    """Return each kind of strides once, and which of them each map has: what two maps share is computed once."""
    each = tuple(dict.fromkeys(strides))
    return each, tuple(each.index(one) for one in strides)
