"""Triton kernels of instance norm and leaky rectifier, backward, on the tiles and in the order of the forward pass.

The normalised map and the rectifier's sign are computed anew from the map and its statistics: nothing else was kept.
Two sums per sample and channel make all gradients: of the gradient g behind the rectifier, and of g times the
normalised map. Planes that a program holds give both and the map's gradient in one launch. Larger ones are read twice:
for the sums, whose parts are added up in their order, and for the map's gradient. A last launch adds up the samples'
sums, which are the gradients of bias and weight. No atomics: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* backward, held planes, B=32 C=128 H=64 W=64: 6.00 bytes per element, least 6.00; 23.4 us, floor 23.4 us
* backward, large planes, B=32 C=32 H=256 W=256: 10.00 bytes per element, least 6.00; 156.1 us, floor 93.6 us
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .gates import add_parts
from .instance_norm_leaky_relu import (
    TILES_PER_PROGRAM,
    dense,
    held_settings,
    held_tile,
    map_sizes,
    scale_and_shift,
    walk,
)
from .maps import (
    THREADS,
    TILE_CHOICES,
    WARP_SIZE,
    channel_block,
    channel_blocks,
    is_flat,
    map_key,
    map_pointers,
    strides_of,
    tile_of,
    unit_of,
)

SAMPLES_AT_ONCE, CHANNELS_AT_ONCE = 16, 32  # of the sums that make the gradients of weight and bias
Saved = Sequence[Tensor | None]  # weight, bias, means, reciprocal deviations


@triton.jit
def _held_bwd_kernel(
    grad,
    x,
    weight,
    bias,
    means,
    rstds,
    x_grad,  # or None
    sums,  # (B, 2, C): of the gradient behind the rectifier times the normalised map, and of that gradient
    channel_units,
    width,
    pixels,
    negative_slope,
    grad_strides,
    x_strides,
    x_grad_strides,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,  # at least all pixels
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    b, c, channel_exists = channel_block(tl.program_id(0), channels, CHANNELS)
    p = tl.arange(0, PIXELS)
    exists = channel_exists[:, None] & (p < pixels)[None, :]
    mean = tl.load(means + b * channels + c, mask=channel_exists, other=0.0)
    rstd = tl.load(rstds + b * channels + c, mask=channel_exists, other=0.0)
    scale, shift = scale_and_shift(weight, bias, rstd, c, channel_exists)
    source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
    centred = tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean[:, None]
    source = map_pointers(grad, grad_strides, b, c, p, width, FLAT, UNIT)
    incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    incoming = tl.where(centred * scale[:, None] + shift[:, None] > 0, incoming, incoming * negative_slope)
    product_sum, grad_sum = tl.sum(incoming * centred, axis=1) * rstd, tl.sum(incoming, axis=1)
    target = sums + b * 2 * channels + c
    tl.store(target, product_sum, mask=channel_exists)
    tl.store(target + channels, grad_sum, mask=channel_exists)
    if x_grad is not None:
        of_centred = (rstd * product_sum / pixels)[:, None]
        outgoing = scale[:, None] * (incoming - (grad_sum / pixels)[:, None] - centred * of_centred)
        target = map_pointers(x_grad, x_grad_strides, b, c, p, width, FLAT, UNIT)
        tl.store(target, outgoing.to(x_grad.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["splits"])
def _gradient_kernel(
    grad,
    x,
    weight,
    bias,
    means,
    rstds,
    x_grad,  # or None: then the sums are made
    sums,  # (splits, B, 2, C) to make, or (B, 2, C) to take: as in the kernel of held planes
    channel_units,
    width,
    pixels,
    rows,  # B * 2 * C
    part_pixels,
    negative_slope,
    grad_strides,
    x_strides,
    x_grad_strides,
    splits,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    split = tl.program_id(0) % splits
    b, c, channel_exists = channel_block(tl.program_id(0) // splits, channels, CHANNELS)
    first = split * part_pixels
    mean = tl.load(means + b * channels + c, mask=channel_exists, other=0.0)
    rstd = tl.load(rstds + b * channels + c, mask=channel_exists, other=0.0)
    scale, shift = scale_and_shift(weight, bias, rstd, c, channel_exists)
    sums += b * 2 * channels + c
    if x_grad is None:
        product_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
        grad_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    else:
        of_centred = tl.load(sums, mask=channel_exists, other=0.0) * rstd / pixels
        of_all = tl.load(sums + channels, mask=channel_exists, other=0.0) / pixels
    for start in range(first, tl.minimum(first + part_pixels, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        exists = channel_exists[:, None] & (p < pixels)[None, :]
        source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
        centred = tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean[:, None]
        source = map_pointers(grad, grad_strides, b, c, p, width, FLAT, UNIT)
        incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        incoming = tl.where(centred * scale[:, None] + shift[:, None] > 0, incoming, incoming * negative_slope)
        if x_grad is None:
            product_sums += incoming * centred
            grad_sums += incoming
        else:
            outgoing = scale[:, None] * (incoming - of_all[:, None] - centred * of_centred[:, None])
            target = map_pointers(x_grad, x_grad_strides, b, c, p, width, FLAT, UNIT)
            tl.store(target, outgoing.to(x_grad.dtype.element_ty), mask=exists)
    if x_grad is None:
        target = sums + split.to(tl.int64) * rows
        tl.store(target, tl.sum(product_sums, axis=1) * rstd, mask=channel_exists)
        tl.store(target + channels, tl.sum(grad_sums, axis=1), mask=channel_exists)


@triton.jit
def _affine_gradients_kernel(
    sums,  # (B, 2, C)
    weight_grad,  # (C,), or None
    bias_grad,  # (C,), or None
    batch,
    channels,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    of_weight = tl.zeros((SAMPLES, CHANNELS), dtype=tl.float32)
    of_bias = tl.zeros((SAMPLES, CHANNELS), dtype=tl.float32)
    for start in range(0, batch, SAMPLES):
        b = start + tl.arange(0, SAMPLES)
        exists = (b < batch)[:, None] & (c < channels)[None, :]
        source = sums + b.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        of_weight += tl.load(source, mask=exists, other=0.0)
        of_bias += tl.load(source + channels, mask=exists, other=0.0)
    if weight_grad is not None:
        tl.store(weight_grad + c, tl.sum(of_weight, axis=0).to(weight_grad.dtype.element_ty), mask=c < channels)
    if bias_grad is not None:
        tl.store(bias_grad + c, tl.sum(of_bias, axis=0).to(bias_grad.dtype.element_ty), mask=c < channels)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    negative_slope: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Launch the backward kernels; return those gradients of x, weight and bias that are needed."""
    affine_grads = [
        torch.empty(value.shape, dtype=value.dtype, device=value.device) if value is not None and need else None
        for value, need in zip((weight, bias), needed[1:], strict=True)
    ]
    written = [value for value in affine_grads if value is not None]
    if x.numel() == 0:
        return [*([torch.empty_like(x)] if needed[0] else []), *(value.zero_() for value in written)]
    saved = (*dense(weight, bias), means, rstds)
    with torch.cuda.device_of(x):
        if held_tile(x) is None:
            sums = _make_sums(grad, x, saved, negative_slope)
            x_grads = [map_gradient(grad, x, saved, sums, negative_slope)] if needed[0] else []
        else:
            sums, x_grads = _held_gradients(grad, x, saved, negative_slope, needed[0])
        if written:
            launching.launch(
                _affine_gradients_kernel,
                (launching.cdiv(x.shape[1], CHANNELS_AT_ONCE),),
                *(sums, *affine_grads, x.shape[0], x.shape[1]),
                SAMPLES=SAMPLES_AT_ONCE,
                CHANNELS=CHANNELS_AT_ONCE,
                num_warps=THREADS // WARP_SIZE,
            )
    return [*x_grads, *written]


def _held_gradients(
    grad: Tensor, x: Tensor, saved: Saved, negative_slope: float, needs_x: bool
) -> tuple[Tensor, list[Tensor]]:
    """Launch the kernel of held planes; return the sums (B, 2, C), and the gradient of the map if it is needed."""
    tile, x_grads = held_tile(x), [torch.empty_like(x)] if needs_x else []
    assert tile is not None
    maps = (grad, x, *x_grads)
    unit, sums = unit_of(*maps), torch.empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32, device=x.device)
    launching.launch(
        _held_bwd_kernel,
        (channel_blocks(x, tile[0]),),
        *(grad, x, *saved, x_grads[0] if needs_x else None, sums, *map_sizes(x, unit), negative_slope),
        *(strides_of(m, unit) for m in (grad, x, maps[-1])),
        **held_settings(tile),
        FLAT=is_flat(*maps),
        UNIT=unit,
    )
    return sums, x_grads


def _make_sums(grad: Tensor, x: Tensor, saved: Saved, negative_slope: float) -> Tensor:
    """Launch what adds up the sums (B, 2, C) of large planes, in parts or at once."""
    channels, pixels = tile_of(x)
    programs, splits, part = walk(x, channels, pixels)
    parts = torch.empty((splits, x.shape[0], 2, x.shape[1]), dtype=torch.float32, device=x.device)
    _launch_gradient(programs, grad, x, saved, None, parts, negative_slope, (channels, pixels), (splits, part))
    return add_parts(parts, torch.float32)


@tuning.tunable(TILE_CHOICES, lambda grad, x, *small: map_key(x))
def map_gradient(
    choice: tuning.Choice, grad: Tensor, x: Tensor, saved: Saved, sums: Tensor, negative_slope: float
) -> Tensor:
    """Launch what makes the gradient of large planes from sums that are known."""
    x_grad, (channels, pixels) = torch.empty_like(x), tile_of(x, choice["tiles"])
    part = TILES_PER_PROGRAM * pixels
    splits = launching.cdiv(x.shape[2] * x.shape[3], part)
    programs = channel_blocks(x, channels) * splits
    _launch_gradient(programs, grad, x, saved, x_grad, sums, negative_slope, (channels, pixels), (splits, part))
    return x_grad


def _launch_gradient(
    programs: int,
    grad: Tensor,
    x: Tensor,
    saved: Saved,
    x_grad: Tensor | None,
    sums: Tensor,
    negative_slope: float,
    tile: tuple[int, int],
    parts: tuple[int, int],
) -> None:
    """Launch the kernel of large planes: to make the sums, or, with a gradient to write, to take them."""
    maps = (grad, x) if x_grad is None else (grad, x, x_grad)
    unit, (splits, part) = unit_of(*maps), parts
    launching.launch(
        _gradient_kernel,
        (programs,),
        *(grad, x, *saved, x_grad, sums, *map_sizes(x, unit), 2 * x.shape[0] * x.shape[1], part, negative_slope),
        *(strides_of(m, unit) for m in (grad, x, maps[-1])),
        splits,
        CHANNELS=tile[0],
        PIXELS=tile[1],
        FLAT=is_flat(*maps),
        UNIT=unit,
        num_warps=THREADS // WARP_SIZE,
    )
