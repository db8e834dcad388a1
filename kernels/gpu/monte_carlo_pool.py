"""Triton kernels of Monte Carlo attention's pooling: the mean over one drawn cell of a map.

Programs work on tiles of a few channels and many of the cell's positions, or the other way round in channels-last maps
(`maps` has the tiles that all kernels of maps share). A cell of one row and column per map is read in the map's own
order, 16 bytes per thread; others by their rows and columns, or through the permutation. The draw is read on the GPU,
so a recorded graph serves any draw; a cell that does not exist gives NaN.

Backward writes every position of the gradient once. With a permutation a first launch marks the chosen positions, all
of them different. No atomics: results repeat bit for bit. The channel gate's kernels are in `gates`.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=16 C=256 H=64 W=64: 0.50 bytes per element, least 0.50; 1.9 us, floor 1.9 us
* backward, B=16 C=256 H=64 W=64: 2.00 bytes per element, least 2.00; 7.8 us, floor 7.8 us
Forward reads the drawn cell alone: of a grid of scale x scale, one part in scale squared; here the scale is 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .gates import add_parts
from .maps import (
    ENOUGH_PROGRAMS,
    THREADS,
    TILE_CHOICES,
    WARP_SIZE,
    channel_block,
    is_flat,
    map_key,
    part_programs,
    parts_of,
    pixel_offsets,
    row_strides,
    strides_of,
    tile_of,
    unit_of,
)

MARK_PIXELS = 256
MOST_STEPS = 8  # tiles of a program in backward, for which the draw's edges are computed once
LARGEST_SCALE = tl.constexpr(2**15)  # that of the operator: cells of a grid are numbered in 32 bits


@triton.jit
def _draw_of(b, scales, cells, scale_stride, cell_stride, scale, cell):
    """Return the sample's scale and cell, from where the caller left them; 0 for those that do not exist."""
    if scales is not None:
        scale = tl.load(scales + b * scale_stride)
    if cells is not None:
        cell = tl.load(cells + b * cell_stride)
    real = (scale >= 1) & (scale <= LARGEST_SCALE) & (cell >= 0) & (cell < scale * scale)
    return tl.where(real, scale, 0).to(tl.int32), tl.where(real, cell, 0).to(tl.int32)


@triton.jit
def _edges(length, scale, index):
    """Return where one interval of an adaptive grid begins, and how long it is; nothing of a scale of 0."""
    divisor = tl.maximum(scale, 1)
    whole, rest = length // divisor, length % divisor  # apart, as index * length may have more than 32 bits
    share = index * rest
    first = index * whole + share // divisor
    last = first + whole + (share % divisor + rest + divisor - 1) // divisor
    return first, tl.where(scale > 0, last - first, 0)


@triton.jit(do_not_specialize=["scale", "cell", "splits"])
def _monte_carlo_pool_fwd_kernel(
    x,
    scales,  # (B,) or None: then `scale` holds for all samples
    cells,
    permutation,  # (B, H * W) or None
    target,  # (splits, B * C): each part's share of the mean
    channel_units,
    height,
    width,
    pixels,
    rows,  # B * C
    x_stride_b,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    scale_stride,
    cell_stride,
    permutation_stride,
    scale,
    cell,
    splits,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    split = tl.program_id(0) % splits
    b, c, channel_exists = channel_block(tl.program_id(0) // splits, channels, CHANNELS)
    scale, cell = _draw_of(b, scales, cells, scale_stride, cell_stride, scale, cell)
    top, cell_height = _edges(height, scale, cell // tl.maximum(scale, 1))
    left, cell_width = _edges(width, scale, cell % tl.maximum(scale, 1))
    count = cell_height * cell_width
    maps = x + b * (x_stride_b * UNIT) + c.to(tl.int64)[:, None] * x_stride_c
    sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    if FLAT and scale == 1:  # the whole map, in its own order
        for start in range(split * PIXELS, pixels, splits * PIXELS):
            p = start + tl.arange(0, PIXELS)
            exists = channel_exists[:, None] & (p < pixels)[None, :]
            sums += tl.load(maps + p.to(tl.int64)[None, :] * (x_stride_w * UNIT), mask=exists, other=0.0).to(tl.float32)
    else:
        for start in range(split * PIXELS, count, splits * PIXELS):
            place = start + tl.arange(0, PIXELS)
            in_cell = place < count
            p = (top + place // cell_width) * width + left + place % cell_width
            if permutation is not None:
                p = tl.load(permutation + b * permutation_stride + p, mask=in_cell, other=0).to(tl.int32)
            on_map = (p >= 0) & (p < pixels)
            offsets = pixel_offsets(p, width, x_stride_h, x_stride_w, FLAT, UNIT)
            exists = channel_exists[:, None] & (in_cell & on_map)[None, :]
            values = tl.load(maps + offsets[None, :], mask=exists, other=0.0).to(tl.float32)
            sums += tl.where((in_cell & ~on_map)[None, :], float("nan"), values)
    mean = tl.sum(sums, axis=1) / count.to(tl.float32)
    pointer = target + split.to(tl.int64) * rows + b * channels + c
    tl.store(pointer, mean.to(target.dtype.element_ty), mask=channel_exists)


@triton.jit(do_not_specialize=["scale", "cell"])
def _monte_carlo_pool_mark_kernel(
    scales,
    cells,
    permutation,
    chosen,  # (B or 1, H * W) uint8: whether the position is in the cell
    height,
    width,
    pixels,
    scale_stride,
    cell_stride,
    permutation_stride,
    scale,
    cell,
    PIXELS: tl.constexpr,
):
    blocks = tl.cdiv(pixels, PIXELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)
    scale, cell = _draw_of(b, scales, cells, scale_stride, cell_stride, scale, cell)
    inside = _in_cell(place, height, width, scale, cell)
    p = tl.load(permutation + b * permutation_stride + place, mask=place < pixels, other=-1)
    tl.store(chosen + b * pixels + p, inside.to(tl.uint8), mask=(p >= 0) & (p < pixels))


@triton.jit
def _in_cell(place, height, width, scale, cell):
    """Tell which places of the grid lie in its cell."""
    top, cell_height = _edges(height, scale, cell // tl.maximum(scale, 1))
    left, cell_width = _edges(width, scale, cell % tl.maximum(scale, 1))
    row, column = place // width, place % width
    return (row >= top) & (row < top + cell_height) & (column >= left) & (column < left + cell_width)


@triton.jit(do_not_specialize=["scale", "cell"])
def _monte_carlo_pool_bwd_kernel(
    grad,  # (B, C)
    scales,
    cells,
    chosen,  # (B or 1, H * W), or None: then the cell lies where the grid says
    x_grad,
    channel_units,
    height,
    width,
    pixels,
    grad_stride_b,
    grad_stride_c,
    x_grad_stride_c,
    x_grad_stride_w,
    scale_stride,
    cell_stride,
    chosen_stride,
    scale,
    cell,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    STEPS: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    blocks = tl.cdiv(pixels, STEPS * PIXELS)
    b, c, channel_exists = channel_block(tl.program_id(0) // blocks, channels, CHANNELS)
    scale, cell = _draw_of(b, scales, cells, scale_stride, cell_stride, scale, cell)
    _, cell_height = _edges(height, scale, cell // tl.maximum(scale, 1))
    _, cell_width = _edges(width, scale, cell % tl.maximum(scale, 1))
    first = (tl.program_id(0) % blocks) * STEPS * PIXELS
    for step in tl.static_range(STEPS):
        p = first + step * PIXELS + tl.arange(0, PIXELS)
        if chosen is not None:
            inside = tl.load(chosen + b * chosen_stride + p, mask=p < pixels, other=0) != 0
        else:
            inside = _in_cell(p, height, width, scale, cell)
        if step == 0:  # before the loop it would cost registers
            row = grad + b * (grad_stride_b * UNIT) + c * grad_stride_c
            incoming = tl.load(row, mask=channel_exists, other=0.0).to(tl.float32)
            share = incoming / tl.maximum(cell_height * cell_width, 1).to(tl.float32)
        values = tl.where(inside[None, :], share[:, None], 0.0)
        offsets = c.to(tl.int64)[:, None] * x_grad_stride_c + p.to(tl.int64)[None, :] * (x_grad_stride_w * UNIT)
        pointer = x_grad + b * pixels * channels + offsets
        exists = channel_exists[:, None] & (p < pixels)[None, :]
        tl.store(pointer, values.to(x_grad.dtype.element_ty), mask=exists)


@tuning.tunable(TILE_CHOICES, lambda x, *draw: map_key(x, draw[-1] is None))
def pool_forward(
    choice: tuning.Choice,
    x: Tensor,
    scale: int,
    cell: int,
    scales: Tensor | None,
    cells: Tensor | None,
    permutation: Tensor | None,
) -> Tensor:
    """Launch the forward kernel on maps (B, C, H, W); a draw in tensors goes before one in numbers."""
    pooled = torch.empty(x.shape[:2], dtype=x.dtype, device=x.device)
    if pooled.numel() == 0:
        return pooled
    channels, pixels = tile_of(x, choice["tiles"])
    programs, splits = part_programs(x, channels, pixels)
    target, unit = parts_of(pooled, splits), unit_of(x)
    with torch.cuda.device_of(x):
        launching.launch(
            _monte_carlo_pool_fwd_kernel,
            (programs,),
            x,
            scales,
            cells,
            None if permutation is None else permutation.contiguous(),
            target,
            x.shape[1] // unit,
            x.shape[2],
            x.shape[3],
            x.shape[2] * x.shape[3],
            pooled.numel(),
            *strides_of(x, unit),
            _sample_stride(scales, 0),
            _sample_stride(cells, 0),
            _sample_stride(permutation, 1),
            scale,
            cell,
            splits,
            CHANNELS=channels,
            PIXELS=pixels,
            FLAT=is_flat(x),
            UNIT=unit,
            num_warps=THREADS // WARP_SIZE,
        )
        return add_parts(target, x.dtype)


@tuning.tunable(TILE_CHOICES, lambda grad, size, *draw: tuning.key_of(grad, tuple(size), draw[-2] is None, draw[-1]))
def pool_backward(
    choice: tuning.Choice,
    grad: Tensor,
    size: Sequence[int],
    scale: int,
    cell: int,
    scales: Tensor | None,
    cells: Tensor | None,
    permutation: Tensor | None,
    channels_last: bool,
) -> Tensor:
    """Launch the backward kernels; return the gradient of maps of shape ``size``, in the layout asked for."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x_grad = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    if x_grad.numel() == 0:
        return x_grad
    if size[1] * grad.stride(1) >= 1 << 31:  # the kernel multiplies channels and their stride in 32 bits
        grad = grad.contiguous()
    channels, pixels = tile_of(x_grad, choice["tiles"])
    positions, unit = x_grad.shape[2] * x_grad.shape[3], unit_of(x_grad, rows=(grad,))
    with torch.cuda.device_of(grad):
        chosen = None
        if permutation is not None:
            chosen = _mark(size, scale, cell, scales, cells, permutation)
        blocks, tiles = size[0] * launching.cdiv(size[1], channels), launching.cdiv(positions, pixels)
        steps = max(1, min(MOST_STEPS, tiles, blocks * tiles // ENOUGH_PROGRAMS))
        launching.launch(
            _monte_carlo_pool_bwd_kernel,
            (blocks * launching.cdiv(tiles, steps),),
            grad,
            scales,
            cells,
            chosen,
            x_grad,
            size[1] // unit,
            *size[2:],
            positions,
            *row_strides(grad, unit),
            strides_of(x_grad)[1],
            strides_of(x_grad, unit)[3],
            _sample_stride(scales, 0),
            _sample_stride(cells, 0),
            _sample_stride(chosen, 1),
            scale,
            cell,
            CHANNELS=channels,
            PIXELS=pixels,
            STEPS=steps,
            UNIT=unit,
            num_warps=THREADS // WARP_SIZE,
        )
    return x_grad


def _mark(
    size: Sequence[int], scale: int, cell: int, scales: Tensor | None, cells: Tensor | None, permutation: Tensor
) -> Tensor:
    """Mark the positions that the drawn cell stands for: (B, H * W), or (1, H * W) where all samples share a draw."""
    batch, _, height, width = size
    shared = permutation.ndim == 1 and all(draw is None or draw.ndim == 0 for draw in (scales, cells))
    chosen = torch.empty((1 if shared else batch, height * width), dtype=torch.uint8, device=permutation.device)
    launching.launch(
        _monte_carlo_pool_mark_kernel,
        (len(chosen) * launching.cdiv(height * width, MARK_PIXELS),),
        scales,
        cells,
        permutation.contiguous(),
        chosen,
        height,
        width,
        height * width,
        _sample_stride(scales, 0),
        _sample_stride(cells, 0),
        _sample_stride(permutation, 1),
        scale,
        cell,
        PIXELS=MARK_PIXELS,
        num_warps=THREADS // WARP_SIZE,
    )
    return chosen


def _sample_stride(tensor: Tensor | None, dims: int) -> int:
    """Return how far one sample's part lies from the next one's; 0 where all samples share one of ``dims`` dimensions.

    A permutation is made contiguous before, and marks are.
    """
    if tensor is None or tensor.ndim == dims or len(tensor) == 1:
        return 0
    return tensor.shape[1] if dims else tensor.stride(0)
