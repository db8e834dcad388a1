"""Triton kernels of dilated attention with windows of 3 x 3.

One launch serves all heads and dilations. A program owns PIXELS pixels of one head; its channels come in chunks of 16
bytes per thread, so that up to 32 channels one thread holds a whole pixel, inner products need no exchange between
threads, and a head of 24 channels is three chunks, not one of 32 with a quarter of nothing. The nine logits stay in
registers.

Backward takes two launches. The first gathers dq over the nine keys of each query, together with the sum that the
softmax's gradient subtracts; the second gathers dk and dv over the queries that see each pixel. Their loops over taps
are not unrolled: unrolled, they would need more registers than there are. No atomics: results repeat bit for bit.

Kernels of this file give each thread one pixel. Those of `dilated_attention_pairs` give it two where they can.

Strides are given in units of UNIT elements. A compiler only believes in multiples of 16, and would load element by
element what lies 216 elements apart, although that is a multiple of 16 bytes.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 H=64 W=64 C=72: 8.17 bytes per element, least 8.00; 17.9 us, floor 17.6 us
* backward, B=32 H=64 W=64 C=72: 22.67 bytes per element, least 14.00; 49.8 us, floor 30.7 us
Forward writes the denominators, too. Backward reads all maps in both launches: in one, dk and dv would need atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dilated_attention_pairs as pairs
from . import dilated_attention_pairs_backward as pairs_backward
from . import launching, tuning

CHOICES = ({"threads": 128}, {"threads": 64})  # per program
WARP_SIZE = 64 if torch.version.hip else 32
BYTES_PER_THREAD = 16
MOST_CHANNELS_PER_THREAD = 32  # of one pixel; more, and backward runs out of registers
Layouts = tuple[Any, ...]
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(height, width, HEADS: tl.constexpr, DILATIONS: tl.constexpr, PIXELS: tl.constexpr):
    """Return where this program works, (sample, y, x, head), its dilation, its place in (B, HEADS, H, W), and a mask.

    The heads of one tile of pixels run side by side, for their channels share lines of the cache.
    """
    tiles = tl.cdiv(height * width, PIXELS)
    head, tile = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    sample, pixel = (tile // tiles).to(tl.int64), tile % tiles * PIXELS + tl.arange(0, PIXELS)
    dilation = 0
    for g in tl.static_range(len(DILATIONS)):
        dilation += tl.where(head // (HEADS // len(DILATIONS)) == g, DILATIONS[g], 0)
    number = (sample * HEADS + head) * height * width + pixel
    return (sample, pixel // width, pixel % width, head), dilation, number, pixel < height * width


@triton.jit
def _tile(x, strides, here, D: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Return pointers to the first chunk of channels of a head at each pixel, (PIXELS, CHUNK)."""
    sample, row, column, head = here
    pixels = sample * strides[0] + row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    pixels = pixels * UNIT + tl.cast(head * D, tl.int64) * strides[3]
    channels = tl.arange(0, CHUNK).to(tl.int64) * strides[3]
    return x + pixels[:, None] + channels[None, :]


@triton.jit
def _moved(tile, rows, columns, strides, UNIT: tl.constexpr, EACH: tl.constexpr):
    """Move a tile by rows and columns, EACH pixel by its own or all alike; in 64 bits, as rows may lie far apart."""
    distance = (tl.cast(rows, tl.int64) * strides[1] + tl.cast(columns, tl.int64) * strides[2]) * UNIT
    return tile + (distance[:, None] if EACH else distance)


@triton.jit
def _chunk(tile, channel, strides):
    """Move a tile on by some channels, which may lie far apart as well."""
    return tile + tl.cast(strides[3], tl.int64) * channel


@triton.jit
def _load(tile, strides, exists, D: tl.constexpr, CHUNK: tl.constexpr):
    """Load all channels of each pixel, chunk by chunk, as float32; zeros where there is nothing."""
    chunks = ()
    for c in tl.static_range((D + CHUNK - 1) // CHUNK):
        mask = exists[:, None]
        if (c + 1) * CHUNK > D:
            mask = mask & (tl.arange(0, CHUNK) < D - c * CHUNK)[None, :]
        chunks = chunks + (tl.load(_chunk(tile, c * CHUNK, strides), mask=mask, other=0.0).to(tl.float32),)
    return chunks


@triton.jit
def _store(tile, strides, chunks, factor, exists, D: tl.constexpr, CHUNK: tl.constexpr):
    """Store all channels of each pixel, times a factor, in the type of the map."""
    for c in tl.static_range((D + CHUNK - 1) // CHUNK):
        mask = exists[:, None]
        if (c + 1) * CHUNK > D:
            mask = mask & (tl.arange(0, CHUNK) < D - c * CHUNK)[None, :]
        tl.store(_chunk(tile, c * CHUNK, strides), (chunks[c] * factor).to(tile.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(PIXELS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    chunks = ()
    for _ in tl.static_range((D + CHUNK - 1) // CHUNK):
        chunks = chunks + (tl.zeros((PIXELS, CHUNK), dtype=tl.float32),)
    return chunks


@triton.jit
def _dot(left, right):
    """Return the inner product over the channels of each pixel."""
    products = left[0] * right[0]
    for c in tl.static_range(1, len(left)):
        products += left[c] * right[c]
    return tl.sum(products, axis=1)


@triton.jit
def _add(sums, factor, chunks):
    """Return the sums plus each pixel's factor times its channels."""
    updated = ()
    for c in tl.static_range(len(sums)):
        updated = updated + (sums[c] + factor[:, None] * chunks[c],)
    return updated


@triton.jit
def _window_start(position, length, dilation):
    """Return the first place of a window that slides inside, on the line of positions that a dilation connects."""
    places = (length - position % dilation + dilation - 1) // dilation
    return tl.minimum(tl.maximum(position // dilation - 1, 0), places - 3)


@triton.jit
def _tap(position, tap, length, dilation, SHIFT: tl.constexpr):
    """Return how far a tap (-1, 0 or 1) lies from a query on one axis, in pixels, and whether it is in the image."""
    step = tap * dilation
    if SHIFT:
        step += (_window_start(position, length, dilation) + 1 - position // dilation) * dilation
    return step, (position + step >= 0) & (position + step < length)


@triton.jit
def _viewer(position, tap, length, dilation, SHIFT: tl.constexpr):
    """Return how far a query lies from a position on one axis, in pixels, and whether it is there and sees it."""
    query = position + tap * dilation
    sees = (query >= 0) & (query < length)
    if SHIFT:
        place = position // dilation - _window_start(query, length, dilation)
        sees = sees & (place >= 0) & (place <= 2)
    return tap * dilation, sees


@triton.jit
def _dilated_attention_fwd_kernel(
    maps,  # q, k, v, out: pointers to (B, height, width, HEADS * D)
    strides,  # of each map: of (B, height, width) in units of UNIT elements, and of the channels in elements
    normaliser,  # (B, HEADS, height, width) float32: log2 of the softmax's denominator
    height,
    width,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DILATIONS: tl.constexpr,
    MASK: tl.constexpr,
    SHIFT: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):
    here, dilation, number, exists = _place(height, width, HEADS, DILATIONS, PIXELS)
    queries = _load(_tile(maps[0], strides[0], here, D, CHUNK, UNIT), strides[0], exists, D, CHUNK)
    key_tile = _tile(maps[1], strides[1], here, D, CHUNK, UNIT)
    value_tile = _tile(maps[2], strides[2], here, D, CHUNK, UNIT)
    logits, taps, largest = (), (), tl.full((PIXELS,), -float("inf"), dtype=tl.float32)
    for i in tl.static_range(3):
        dy, row_inside = _tap(here[1], i - 1, height, dilation, SHIFT)
        for j in tl.static_range(3):
            dx, inside = _tap(here[2], j - 1, width, dilation, SHIFT)
            inside = inside & row_inside & exists
            keys = _load(_moved(key_tile, dy, dx, strides[1], UNIT, SHIFT), strides[1], inside, D, CHUNK)
            logit = _dot(queries, keys) * (scale * LOG2_E)
            if MASK:
                logit = tl.where(inside | (exists == 0), logit, -float("inf"))
            logits, taps = logits + (logit,), taps + ((dy, dx, inside),)
            largest = tl.maximum(largest, logit)
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    attended = _zeros(PIXELS, D, CHUNK)
    for t in tl.static_range(9):
        dy, dx, inside = taps[t]
        values = _load(_moved(value_tile, dy, dx, strides[2], UNIT, SHIFT), strides[2], inside, D, CHUNK)
        weight = tl.exp2(logits[t] - largest)
        total += weight
        attended = _add(attended, weight, values)
    out_tile = _tile(maps[3], strides[3], here, D, CHUNK, UNIT)
    _store(out_tile, strides[3], attended, (1.0 / total)[:, None], exists, D, CHUNK)
    tl.store(normaliser + number, largest + tl.log2(total), mask=exists)


@triton.jit
def _dilated_attention_dq_kernel(
    maps,  # grad, q, k, v, and the gradient of q or None where it is not asked for: (B, height, width, HEADS * D)
    strides,
    normaliser,  # (B, HEADS, height, width) float32
    weighted_grad,  # (B, HEADS, height, width) float32: sum_t p[t] <grad, value[t]>
    height,
    width,
    taps,  # 9; not a constant, so that no compiler unrolls the loop
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DILATIONS: tl.constexpr,
    SHIFT: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):
    here, dilation, number, exists = _place(height, width, HEADS, DILATIONS, PIXELS)
    grads = _load(_tile(maps[0], strides[0], here, D, CHUNK, UNIT), strides[0], exists, D, CHUNK)
    queries = _load(_tile(maps[1], strides[1], here, D, CHUNK, UNIT), strides[1], exists, D, CHUNK)
    key_tile = _tile(maps[2], strides[2], here, D, CHUNK, UNIT)
    value_tile = _tile(maps[3], strides[3], here, D, CHUNK, UNIT)
    norm = tl.load(normaliser + number, mask=exists, other=0.0)
    # dq = scale sum_t p[t] (<grad, value[t]> - subtracted) key[t]: two sums side by side, as the number to subtract is
    # known only after the last tap.
    first, second = _zeros(PIXELS, D, CHUNK), _zeros(PIXELS, D, CHUNK)
    subtracted = tl.zeros((PIXELS,), dtype=tl.float32)
    for t in range(taps):
        dy, row_inside = _tap(here[1], t // 3 - 1, height, dilation, SHIFT)
        dx, inside = _tap(here[2], t % 3 - 1, width, dilation, SHIFT)
        inside = inside & row_inside & exists
        keys = _load(_moved(key_tile, dy, dx, strides[2], UNIT, SHIFT), strides[2], inside, D, CHUNK)
        values = _load(_moved(value_tile, dy, dx, strides[3], UNIT, SHIFT), strides[3], inside, D, CHUNK)
        # A tap outside adds zeros to all three sums; without a limit to its weight these would be infinity times zero.
        logit = tl.where(inside, _dot(queries, keys) * (scale * LOG2_E), -float("inf"))
        weight = tl.exp2(logit - norm)
        weighted = weight * _dot(grads, values)
        subtracted += weighted
        first, second = _add(first, weighted, keys), _add(second, weight, keys)
    tl.store(weighted_grad + number, subtracted, mask=exists)
    if maps[4] is not None:
        q_grad_tile = _tile(maps[4], strides[4], here, D, CHUNK, UNIT)
        _store(q_grad_tile, strides[4], _add(first, -subtracted, second), scale, exists, D, CHUNK)


@triton.jit
def _dilated_attention_dkdv_kernel(
    maps,  # grad, q, k, v, and the gradients of k and v or None where they are not asked for
    strides,
    normaliser,  # (B, HEADS, height, width) float32
    weighted_grad,  # (B, HEADS, height, width) float32, of the other kernel
    height,
    width,
    taps,  # SIDE * SIDE; not a constant, so that no compiler unrolls the loop
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DILATIONS: tl.constexpr,
    SHIFT: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):
    SIDE: tl.constexpr = 5 if SHIFT else 3  # a window that slid inside is seen from further away
    here, dilation, number, exists = _place(height, width, HEADS, DILATIONS, PIXELS)
    grad_tile = _tile(maps[0], strides[0], here, D, CHUNK, UNIT)
    query_tile = _tile(maps[1], strides[1], here, D, CHUNK, UNIT)
    keys = _load(_tile(maps[2], strides[2], here, D, CHUNK, UNIT), strides[2], exists, D, CHUNK)
    values = _load(_tile(maps[3], strides[3], here, D, CHUNK, UNIT), strides[3], exists, D, CHUNK)
    key_grads, value_grads = _zeros(PIXELS, D, CHUNK), _zeros(PIXELS, D, CHUNK)
    for t in range(taps):
        dy, row_seen = _viewer(here[1], t // SIDE - SIDE // 2, height, dilation, SHIFT)
        dx, seen = _viewer(here[2], t % SIDE - SIDE // 2, width, dilation, SHIFT)
        seen = seen & row_seen & exists
        norm = tl.load(normaliser + number + dy * width + dx, mask=seen, other=0.0)
        subtracted = tl.load(weighted_grad + number + dy * width + dx, mask=seen, other=0.0)
        grads = _load(_moved(grad_tile, dy, dx, strides[0], UNIT, False), strides[0], seen, D, CHUNK)
        queries = _load(_moved(query_tile, dy, dx, strides[1], UNIT, False), strides[1], seen, D, CHUNK)
        # Where no query sees this pixel, queries and gradients are zeros, and so is all that is added.
        weight = tl.exp2(_dot(queries, keys) * (scale * LOG2_E) - norm)
        key_grads = _add(key_grads, weight * (_dot(grads, values) - subtracted), queries)
        value_grads = _add(value_grads, weight, grads)
    if maps[4] is not None:
        _store(_tile(maps[4], strides[4], here, D, CHUNK, UNIT), strides[4], key_grads, scale, exists, D, CHUNK)
    if maps[5] is not None:
        _store(_tile(maps[5], strides[5], here, D, CHUNK, UNIT), strides[5], value_grads, 1.0, exists, D, CHUNK)


@tuning.tunable(CHOICES, lambda maps, heads, *_: tuning.key_of(maps[0], heads))
def forward(
    choice: tuning.Choice, maps: Sequence[Tensor], num_heads: int, dilations: Sequence[int], scale: float, border: str
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on q, k and v (B, H, W, C); return the result and log2 of the denominators."""
    q = maps[0]
    samples, height, width, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    normaliser = torch.empty((samples, num_heads, height, width), dtype=torch.float32, device=q.device)
    maps = (*maps, out)
    layouts = _layouts(maps)
    settings = _settings(choice["threads"], layouts, num_heads, tuple(dilations), border)
    with torch.cuda.device_of(q):
        if out.numel():
            strides = _strides(layouts, settings["UNIT"])
            if pairs.serves(maps, settings, border):
                pairs.forward(maps, strides, normaliser, scale, settings, border)
                return out, normaliser
            grid, others = _grid(q, num_heads, settings), (normaliser, height, width, scale)
            constants = settings | {"MASK": border == "mask"}
            launching.launch(_dilated_attention_fwd_kernel, grid, maps, strides, *others, **constants)
    return out, normaliser


@tuning.tunable(CHOICES, lambda grad, *rest: tuning.key_of(grad, rest[3]))
def backward(
    choice: tuning.Choice, grad: Tensor, maps: Sequence[Tensor], normaliser: Tensor, grads: Sequence[Tensor | None],
    num_heads: int, dilations: Sequence[int], scale: float, border: str,
) -> None:  # fmt: skip
    """Launch the backward kernels; they write those of the gradients of q, k and v that are given."""
    if grad.numel() == 0:
        return
    _, height, width, _ = grad.shape
    every = (grad, *maps, *grads)
    layouts = _layouts(every)
    settings = _settings(choice["threads"], layouts, num_heads, tuple(dilations), border)
    strides = _strides(layouts, settings["UNIT"])
    with torch.cuda.device_of(grad):
        if pairs.serves(every, settings, border):
            pairs_backward.backward(every, strides, normaliser, scale, settings)
            return
        grid = _grid(grad, num_heads, settings)
        others = (normaliser, torch.empty_like(normaliser), height, width)  # the second one is of the first launch
        for kernel, taps, wanted, used in (
            (_dilated_attention_dq_kernel, 9, grads[:2], slice(4, 5)),
            (_dilated_attention_dkdv_kernel, 25 if border == "shift" else 9, grads[1:], slice(5, 7)),
        ):
            if any(x is not None for x in wanted):
                tensors, steps = (*every[:4], *every[used]), (*strides[:4], *strides[used])
                launching.launch(kernel, grid, tensors, steps, *others, taps, scale, **settings)


def _layouts(maps: Sequence[Tensor | None]) -> Layouts:
    """Return the shape, the strides and the bytes per element of maps (B, H, W, C): all that launches depend on."""
    return tuple(None if x is None else (x.shape, x.stride(), x.element_size()) for x in maps)


@lru_cache(maxsize=1024)
def _settings(threads: int, layouts: Layouts, heads: int, dilations: tuple[int, ...], border: str) -> dict[str, Any]:
    """Return what a kernel is compiled for, except for the types."""
    shape, _, element_bytes = next(layout for layout in layouts if layout)
    launching.check_positions(shape[1], shape[2])
    d, vector = max(1, shape[-1] // heads), BYTES_PER_THREAD // element_bytes
    threads_per_pixel = min(threads, launching.next_power_of_2(launching.cdiv(d, MOST_CHANNELS_PER_THREAD)))
    whole = all(stride % vector == 0 for layout in layouts if layout for stride in _moving_strides(layout)[:3])
    return {
        "HEADS": heads,
        "D": d,
        "DILATIONS": dilations,
        "SHIFT": border == "shift",
        "PIXELS": threads // threads_per_pixel,
        "CHUNK": vector * threads_per_pixel,
        "UNIT": vector if whole else 1,
        "num_warps": threads // WARP_SIZE,
    }


def _grid(x: Tensor, num_heads: int, settings: dict[str, Any]) -> tuple[int]:
    return (x.shape[0] * launching.cdiv(x.shape[1] * x.shape[2], settings["PIXELS"]) * num_heads,)


@lru_cache(maxsize=1024)
def _strides(layouts: Layouts, unit: int) -> tuple[tuple[int, ...], ...]:
    strides = [_moving_strides(layout) if layout else (0, 0, 0, 1) for layout in layouts]
    return tuple((*(stride // unit for stride in pixels), last) for *pixels, last in strides)


def _moving_strides(layout: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the strides of a map (B, H, W, C), 0 or 1 along axes of one position, where nobody moves."""
    return tuple(s if size > 1 else n for size, s, n in zip(*layout[:2], (0, 0, 0, 1), strict=True))
