"""Triton kernels of the gates: a map multiplied by the sigmoid of a gate, one per channel or one per position.

Programs work on tiles of CHANNELS x PIXELS elements of one sample. The tile lies along whatever is contiguous: pixels
of one or a few channels, or, in channels-last maps, channels of a few pixels. Each thread moves 16 bytes at once where
sizes and strides allow it. Maps are taken with the strides they have; nothing is copied.

Backward reads the gradient and the map once for both gradients. The sum that makes the gate's gradient runs inside one
program, in a fixed order: over the pixels of its channels, or over the channels of its pixels. Channels of many pixels
but too few to fill a GPU are cut into parts, whose sums a second launch adds up in a fixed order. No atomics: results
repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=16 C=256 H=64 W=64: 4.00 bytes per element, least 4.00; 15.6 us, floor 15.6 us
* backward, B=16 C=256 H=64 W=64: 6.00 bytes per element, least 6.00; 23.4 us, floor 23.4 us
A block that pools a map and then gates it reads it a second time, for no gate is known before the whole map was read:
three maps in all, 23.4 us, where the second read does not hit the L2 cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning

THREADS = 128
WARP_SIZE = 64 if torch.version.hip else 32
BYTES_PER_THREAD = 16
TILE = 1024  # elements of a tile
TILE_CHOICES = ({"tiles": 1}, {"tiles": 2})  # how many of those a program works on at once
LEAST_CHANNELS, MOST_CHANNELS = 16, 64  # of a tile that lies along the channels
MOST_IDLE = 1 / 8  # of the channels of such tiles, beyond those that there are
TILES_SHARING = 2  # what a thread of a tile along the channels computes for each of its channels, in forward
LEAST_SPATIAL_PIXELS, SPATIAL_PIXELS = (
    8,
    64,
)  # of a tile that lies along the pixels, where the sum runs over the channels
TILES_PER_PART = 16  # of a channel's pixels, where there are fewer programs than fill a GPU
ENOUGH_PROGRAMS = 1024  # fixed, so that the order of summation does not depend on the device
FEW_PROGRAMS = 256  # do not fill a GPU
ADD_ROWS = 256
_Gradients = tuple[Tensor, list[Tensor]]


@triton.jit
def pixel_offsets(pixels, width, stride_h, stride_w, FLAT: tl.constexpr, UNIT: tl.constexpr = 1):
    """Return the offsets of pixels given by their number, row by row; FLAT where these lie stride_w apart."""
    if FLAT:
        offsets = pixels.to(tl.int64) * (stride_w * UNIT)
    else:
        offsets = (pixels // width).to(tl.int64) * (stride_h * UNIT)
        offsets += (pixels % width).to(tl.int64) * (stride_w * UNIT)
    return offsets


@triton.jit
def channel_block(program, channels, CHANNELS: tl.constexpr):
    """Return the sample of a program, its channels, and which of them exist."""
    blocks = tl.cdiv(channels, CHANNELS)
    c = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return (program // blocks).to(tl.int64), c, c < channels


@triton.jit
def sigmoid(gate):
    """Return the sigmoid of what a gate's pointers load, in float32."""
    return 1.0 / (1.0 + tl.exp(-gate.to(tl.float32)))


@triton.jit
def _gate_fwd_kernel(
    x,
    gate,  # (B, C) or (B, H * W), contiguous
    gated,
    channel_units,
    width,
    pixels,
    x_stride_b,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    gated_stride_b,
    gated_stride_c,
    gated_stride_h,
    gated_stride_w,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    channels = channel_units * UNIT
    blocks = tl.cdiv(pixels, PIXELS)
    b, c, channel_exists = channel_block(tl.program_id(0) // blocks, channels, CHANNELS)
    p = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)
    exists = channel_exists[:, None] & (p < pixels)[None, :]
    if PER_CHANNEL:
        s = sigmoid(tl.load(gate + b * channels + c, mask=channel_exists, other=0.0))[:, None]
    else:
        s = sigmoid(tl.load(gate + b * pixels + p, mask=p < pixels, other=0.0))[None, :]
    c = c.to(tl.int64)[:, None]
    source = (
        x
        + b * (x_stride_b * UNIT)
        + c * x_stride_c
        + pixel_offsets(p, width, x_stride_h, x_stride_w, FLAT, UNIT)[None, :]
    )
    values = tl.load(source, mask=exists, other=0.0).to(tl.float32) * s
    target = gated + b * (gated_stride_b * UNIT) + c * gated_stride_c
    target += pixel_offsets(p, width, gated_stride_h, gated_stride_w, FLAT, UNIT)[None, :]
    tl.store(target, values.to(gated.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["splits"])
def _channel_gate_bwd_kernel(
    grad,
    x,
    gate,  # (B, C), contiguous
    x_grad,  # or None
    target,  # (splits, B * C): each part's share of the gate's gradient
    channel_units,
    width,
    pixels,
    rows,  # B * C
    grad_stride_b,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    x_stride_b,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    x_grad_stride_b,
    x_grad_stride_c,
    x_grad_stride_h,
    x_grad_stride_w,
    splits,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    split = tl.program_id(0) % splits
    b, c, channel_exists = channel_block(tl.program_id(0) // splits, channels, CHANNELS)
    s = sigmoid(tl.load(gate + b * channels + c, mask=channel_exists, other=0.0))
    wide_c = c.to(tl.int64)[:, None]
    grads = grad + b * (grad_stride_b * UNIT) + wide_c * grad_stride_c
    maps = x + b * (x_stride_b * UNIT) + wide_c * x_stride_c
    sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for start in range(split * PIXELS, pixels, splits * PIXELS):
        p = start + tl.arange(0, PIXELS)
        exists = channel_exists[:, None] & (p < pixels)[None, :]
        source = grads + pixel_offsets(p, width, grad_stride_h, grad_stride_w, FLAT, UNIT)[None, :]
        incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        source = maps + pixel_offsets(p, width, x_stride_h, x_stride_w, FLAT, UNIT)[None, :]
        sums += incoming * tl.load(source, mask=exists, other=0.0).to(tl.float32)
        if x_grad is not None:
            outgoing = x_grad + b * (x_grad_stride_b * UNIT) + wide_c * x_grad_stride_c
            outgoing += pixel_offsets(p, width, x_grad_stride_h, x_grad_stride_w, FLAT, UNIT)[None, :]
            tl.store(outgoing, (incoming * s[:, None]).to(x_grad.dtype.element_ty), mask=exists)
    share = tl.sum(sums, axis=1) * s * (1.0 - s)
    pointer = target + split.to(tl.int64) * rows + b * channels + c
    tl.store(pointer, share.to(target.dtype.element_ty), mask=channel_exists)


@triton.jit
def _spatial_gate_bwd_kernel(
    grad,
    x,
    gate,  # (B, H * W), contiguous
    x_grad,  # or None
    gate_grad,  # (B, H * W)
    channel_units,
    width,
    pixels,
    grad_stride_b,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    x_stride_b,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    x_grad_stride_b,
    x_grad_stride_c,
    x_grad_stride_h,
    x_grad_stride_w,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    blocks = tl.cdiv(pixels, PIXELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)
    on_map = p < pixels
    s = sigmoid(tl.load(gate + b * pixels + p, mask=on_map, other=0.0))
    grads = (
        grad + b * (grad_stride_b * UNIT) + pixel_offsets(p, width, grad_stride_h, grad_stride_w, FLAT, UNIT)[None, :]
    )
    maps = x + b * (x_stride_b * UNIT) + pixel_offsets(p, width, x_stride_h, x_stride_w, FLAT, UNIT)[None, :]
    sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        exists = (c < channels)[:, None] & on_map[None, :]
        c = c.to(tl.int64)[:, None]
        incoming = tl.load(grads + c * grad_stride_c, mask=exists, other=0.0).to(tl.float32)
        sums += incoming * tl.load(maps + c * x_stride_c, mask=exists, other=0.0).to(tl.float32)
        if x_grad is not None:
            outgoing = x_grad + b * (x_grad_stride_b * UNIT) + c * x_grad_stride_c
            outgoing += pixel_offsets(p, width, x_grad_stride_h, x_grad_stride_w, FLAT, UNIT)[None, :]
            tl.store(outgoing, (incoming * s[None, :]).to(x_grad.dtype.element_ty), mask=exists)
    share = tl.sum(sums, axis=0) * s * (1.0 - s)
    tl.store(gate_grad + b * pixels + p, share.to(gate_grad.dtype.element_ty), mask=on_map)


@triton.jit(do_not_specialize=["splits"])
def _add_parts_kernel(parts, total, rows, splits, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    added = tl.zeros((ROWS,), dtype=tl.float32)
    pointer = parts + row
    for _ in range(splits):
        added += tl.load(pointer, mask=exists, other=0.0)
        pointer += rows
    tl.store(total + row, added.to(total.dtype.element_ty), mask=exists)


@tuning.tunable(TILE_CHOICES, lambda x, gate: map_key(x, gate.ndim))
def gate_forward(choice: tuning.Choice, x: Tensor, gate: Tensor) -> Tensor:
    """Launch the forward kernel: x (B, C, H, W), and a gate of shape (B, C) or (B, 1, H, W)."""
    gated = torch.empty_like(x)
    if gated.numel() == 0:
        return gated
    unit = unit_of(x, gated)
    sharing = TILES_SHARING if unit > 1 and gate.ndim == 2 else 1
    channels, pixels = tile_of(x, sharing * choice["tiles"])
    with torch.cuda.device_of(x):
        launching.launch(
            _gate_fwd_kernel,
            (_channel_blocks(x, channels) * launching.cdiv(x.shape[2] * x.shape[3], pixels),),
            x,
            gate.contiguous(),
            gated,
            x.shape[1] // unit,
            x.shape[3],
            x.shape[2] * x.shape[3],
            *strides_of(x, unit),
            *strides_of(gated, unit),
            CHANNELS=channels,
            PIXELS=pixels,
            FLAT=is_flat(x, gated),
            UNIT=unit,
            PER_CHANNEL=gate.ndim == 2,
            num_warps=THREADS // WARP_SIZE,
        )
    return gated


def channel_gate_backward(grad: Tensor, x: Tensor, gate: Tensor, needs_x: bool) -> _Gradients:
    """Launch the backward kernel of a gate (B, C); return its gradient, and that of x if it is needed."""
    x_grads = [torch.empty_like(x)] if needs_x else []
    if x.numel() == 0:
        return torch.zeros_like(gate, memory_format=torch.contiguous_format), x_grads
    x_grad = x_grads[0] if needs_x else None
    channels, pixels = tile_of(x)  # of two tiles at once, sm_100 spills a register
    programs, splits = part_programs(x, channels, pixels)
    target, unit = parts_of(gate, splits), unit_of(grad, x, *x_grads)
    with torch.cuda.device_of(x):
        launching.launch(
            _channel_gate_bwd_kernel,
            (programs,),
            grad,
            x,
            gate.contiguous(),
            x_grad,
            target,
            x.shape[1] // unit,
            x.shape[3],
            x.shape[2] * x.shape[3],
            gate.numel(),
            *strides_of(grad, unit),
            *strides_of(x, unit),
            *strides_of(x if x_grad is None else x_grad, unit),
            splits,
            CHANNELS=channels,
            PIXELS=pixels,
            FLAT=is_flat(grad, x, *x_grads),
            UNIT=unit,
            num_warps=THREADS // WARP_SIZE,
        )
        return add_parts(target, gate.dtype), x_grads


@tuning.tunable(TILE_CHOICES, lambda grad, x, gate, needs_x: map_key(x, needs_x))
def spatial_gate_backward(choice: tuning.Choice, grad: Tensor, x: Tensor, gate: Tensor, needs_x: bool) -> _Gradients:
    """Launch the backward kernel of a gate (B, 1, H, W); return its gradient, and that of x if it is needed."""
    x_grads = [torch.empty_like(x)] if needs_x else []
    if x.numel() == 0:
        return torch.zeros_like(gate, memory_format=torch.contiguous_format), x_grads
    x_grad = x_grads[0] if needs_x else None
    gate_grad = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    most = SPATIAL_PIXELS
    while most > LEAST_SPATIAL_PIXELS and x.shape[0] * launching.cdiv(x.shape[2] * x.shape[3], most) < FEW_PROGRAMS:
        most //= 2
    channels, pixels = tile_of(x, choice["tiles"], most)
    unit = unit_of(grad, x, *x_grads)
    with torch.cuda.device_of(x):
        launching.launch(
            _spatial_gate_bwd_kernel,
            (x.shape[0] * launching.cdiv(x.shape[2] * x.shape[3], pixels),),
            grad,
            x,
            gate.contiguous(),
            x_grad,
            gate_grad,
            x.shape[1] // unit,
            x.shape[3],
            x.shape[2] * x.shape[3],
            *strides_of(grad, unit),
            *strides_of(x, unit),
            *strides_of(x if x_grad is None else x_grad, unit),
            CHANNELS=channels,
            PIXELS=pixels,
            FLAT=is_flat(grad, x, *x_grads),
            UNIT=unit,
            num_warps=THREADS // WARP_SIZE,
        )
    return gate_grad, x_grads


# ----------------------------------------------------------------------------- tiles, strides, and sums in parts


def map_key(x: Tensor, *facts: object) -> tuning.Key:
    """Return what the best tile for a map (B, C, H, W) depends on: its shape and layout, and whatever is added."""
    return tuning.key_of(x, x.stride(1) == 1, *facts)


def tile_of(x: Tensor, tiles: int = 1, most_pixels: int | None = None) -> tuple[int, int]:
    """Return the channels and pixels of a tile that lies along what is contiguous in x (B, C, H, W)."""
    launching.check_positions(x.shape[2], x.shape[3])
    elements = tiles * TILE
    channels, pixels = launching.next_power_of_2(x.shape[1]), launching.next_power_of_2(max(1, x.shape[2] * x.shape[3]))
    if x.stride(1) == 1 and x.stride(3) != 1:
        channels = min(channels, MOST_CHANNELS)
        while channels > LEAST_CHANNELS and -x.shape[1] % channels > MOST_IDLE * x.shape[1]:
            channels //= 2
        return channels, min(pixels, elements // channels)
    pixels = min(pixels, most_pixels or elements)
    return min(channels, elements // pixels), pixels


def part_programs(x: Tensor, channels: int, pixels: int) -> tuple[int, int]:
    """Return how many programs sum over the pixels of x, and how many of them share one block of channels."""
    programs, tiles = _channel_blocks(x, channels), launching.cdiv(x.shape[2] * x.shape[3], pixels)
    splits = 1 if programs >= ENOUGH_PROGRAMS else max(1, launching.cdiv(tiles, TILES_PER_PART))
    return programs * splits, splits


def parts_of(total: Tensor, splits: int) -> Tensor:
    """Return where the parts of a total (B, C) go: (splits, B, C); in its own type where there is but one."""
    dtype = total.dtype if splits == 1 else torch.float32
    return torch.empty((splits, *total.shape), dtype=dtype, device=total.device)


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up parts (splits, B, C) in their order."""
    if len(parts) == 1:
        return parts[0]
    total = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    grid = (launching.cdiv(total.numel(), ADD_ROWS),)
    launching.launch(
        _add_parts_kernel, grid, parts, total, total.numel(), len(parts), ROWS=ADD_ROWS, num_warps=THREADS // WARP_SIZE
    )
    return total


def is_flat(*maps: Tensor) -> bool:
    """Tell whether the pixels of all maps lie one distance apart, row after row."""
    return all(m.shape[2] == 1 or m.stride(2) == m.shape[3] * strides_of(m)[3] for m in maps)


def strides_of(x: Tensor, unit: int = 1) -> tuple[int, int, int, int]:
    """Return the strides of x (B, C, H, W), all but the channels' in units; in one column, pixels lie a row apart."""
    b, c, h, w = x.stride()
    return b // unit, c, h // unit, (h if x.shape[3] == 1 else w) // unit


def row_strides(row: Tensor, unit: int) -> tuple[int, int]:
    """Return the strides of a row (B, C), the samples' in units."""
    return row.stride(0) // unit, row.stride(1)


def unit_of(*maps: Tensor, rows: Sequence[Tensor] = ()) -> int:
    """Return the most channels, at most those of 16 bytes, that can be moved at once in each of the maps; 1 if none.

    A compiler only believes in multiples of 16, and would move channels one by one where pixels lie 72 elements apart.
    Counted in units of 8, the product with a constant tells it what it needs.

    Args:
        maps: (B, C, H, W).
        rows: (B, C), whose samples must lie whole units apart as well.
    """
    if any(m.stride(1) != 1 or m.stride(3) == 1 for m in maps):
        return 1
    strides = [stride for m in maps for stride in (m.stride(0), m.stride(2), m.stride(3))]
    strides += [row.stride(0) for row in rows]
    if max(strides) >= 1 << 31:  # in units it would fit into 32 bits again, and its products in the kernels would not
        return 1
    return math.gcd(BYTES_PER_THREAD // maps[0].element_size(), maps[0].shape[1], *strides)


def _channel_blocks(x: Tensor, channels: int) -> int:
    return x.shape[0] * launching.cdiv(x.shape[1], channels)
