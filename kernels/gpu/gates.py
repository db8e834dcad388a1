"""Triton kernels of the gates: a map multiplied by the sigmoid of a gate, one per channel or one per position.

Programs work on the tiles of `maps`; each thread moves 16 bytes at once where sizes and strides allow it.

Backward reads the gradient and the map once for both gradients. The sum that makes the gate's gradient runs inside one
program, in a fixed order: over the pixels of its channels, maybe in parts, or over the channels of its pixels. No
atomics: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=16 C=256 H=64 W=64: 4.00 bytes per element, least 4.00; 15.6 us, floor 15.6 us
* backward, B=16 C=256 H=64 W=64: 6.00 bytes per element, least 6.00; 23.4 us, floor 23.4 us
A block that pools a map and then gates it reads it a second time, for no gate is known before the whole map was read:
three maps in all, 23.4 us, where the second read does not hit the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .maps import (
    THREADS,
    TILE_CHOICES,
    WARP_SIZE,
    channel_block,
    channel_blocks,
    is_flat,
    map_key,
    part_programs,
    parts_of,
    pixel_offsets,
    strides_of,
    tile_of,
    tiles_sharing,
    unit_of,
)

# Of a tile that lies along the pixels, where the sum runs over the channels.
LEAST_SPATIAL_PIXELS, SPATIAL_PIXELS = 8, 64
ADD_ROWS = 256
FEW_PROGRAMS = 256  # do not fill a GPU
_Gradients = tuple[Tensor, list[Tensor]]


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
    source = x + b * (x_stride_b * UNIT) + c * x_stride_c
    source += pixel_offsets(p, width, x_stride_h, x_stride_w, FLAT, UNIT)[None, :]
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
    grads = grad + b * (grad_stride_b * UNIT)
    grads += pixel_offsets(p, width, grad_stride_h, grad_stride_w, FLAT, UNIT)[None, :]
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
    channels, pixels = tile_of(x, choice["tiles"] * (tiles_sharing(unit) if gate.ndim == 2 else 1))
    with torch.cuda.device_of(x):
        launching.launch(
            _gate_fwd_kernel,
            (channel_blocks(x, channels) * launching.cdiv(x.shape[2] * x.shape[3], pixels),),
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
