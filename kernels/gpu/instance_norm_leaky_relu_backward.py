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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .gates import add_parts
from .instance_norm_leaky_relu import (
    TILES_PER_PROGRAM,
    Activation,
    Affine,
    dense,
    held_settings,
    held_tile,
    map_sizes,
    normal_cdf,
    scale_and_shift,
    statistics_of,
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
Saved = Sequence[Any]  # weight, bias, and what normalised; see `Statistics`


@triton.jit
def through_activation(grad, z, negative_slope, ACTIVATION: tl.constexpr):
    """Return the gradient of what an activation was given, z, from that of what it made of it."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        outgoing = grad * (normal_cdf(z) + z * density)
    elif ACTIVATION == "relu":
        outgoing = tl.where(z <= 0, 0.0, grad)
    else:
        outgoing = tl.where(z > 0, grad, grad * negative_slope)
    return outgoing


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
    mean, rstd = statistics_of(means, rstds, None, b, c, channels, channel_exists, True)
    scale, shift = scale_and_shift(weight, bias, rstd, c, channel_exists)
    source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
    centred = tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean[:, None]
    source = map_pointers(grad, grad_strides, b, c, p, width, FLAT, UNIT)
    incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    incoming = through_activation(incoming, centred * scale[:, None] + shift[:, None], negative_slope, "leaky_relu")
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
    means,  # (B, C), or (C,)
    rstds,  # likewise; with eps, variances
    eps,  # or None
    x_grad,  # or None: then the sums are made
    sums,  # (splits, B, 2, C) to make, or (B, 2, C) or (2, C) to take, as in the kernel of held planes; or None
    channel_units,
    width,
    pixels,
    rows,  # B * 2 * C
    values,  # that the statistics are of
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
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = channel_units * UNIT
    split = tl.program_id(0) % splits
    b, c, channel_exists = channel_block(tl.program_id(0) // splits, channels, CHANNELS)
    first = split * part_pixels
    mean, rstd = statistics_of(means, rstds, eps, b, c, channels, channel_exists, PER_SAMPLE)
    scale, shift = scale_and_shift(weight, bias, rstd, c, channel_exists)
    if x_grad is None:
        sums += b * 2 * channels + c
        product_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
        grad_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    elif sums is not None:
        sums += c
        if PER_SAMPLE:
            sums += b * 2 * channels
        of_centred = tl.load(sums, mask=channel_exists, other=0.0) * rstd / values
        of_all = tl.load(sums + channels, mask=channel_exists, other=0.0) / values
    for start in range(first, tl.minimum(first + part_pixels, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        exists = channel_exists[:, None] & (p < pixels)[None, :]
        source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
        centred = tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean[:, None]
        source = map_pointers(grad, grad_strides, b, c, p, width, FLAT, UNIT)
        incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        incoming = through_activation(incoming, centred * scale[:, None] + shift[:, None], negative_slope, ACTIVATION)
        if x_grad is None:
            product_sums += incoming * centred
            grad_sums += incoming
        else:
            if sums is not None:
                incoming = incoming - of_all[:, None] - centred * of_centred[:, None]
            target = map_pointers(x_grad, x_grad_strides, b, c, p, width, FLAT, UNIT)
            tl.store(target, (scale[:, None] * incoming).to(x_grad.dtype.element_ty), mask=exists)
    if x_grad is None:
        target = sums + split.to(tl.int64) * rows
        tl.store(target, tl.sum(product_sums, axis=1) * rstd, mask=channel_exists)
        tl.store(target + channels, tl.sum(grad_sums, axis=1), mask=channel_exists)


@triton.jit
def _affine_gradients_kernel(
    sums,  # (B, 2, C)
    weight_grad,  # (C,), or None
    bias_grad,  # (C,), or None
    totals,  # (2, C), both in float32, or None
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
    of_weight, of_bias = tl.sum(of_weight, axis=0), tl.sum(of_bias, axis=0)
    if weight_grad is not None:
        tl.store(weight_grad + c, of_weight.to(weight_grad.dtype.element_ty), mask=c < channels)
    if bias_grad is not None:
        tl.store(bias_grad + c, of_bias.to(bias_grad.dtype.element_ty), mask=c < channels)
    if totals is not None:
        tl.store(totals + c, of_weight, mask=c < channels)
        tl.store(totals + channels + c, of_bias, mask=c < channels)


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
    affine_grads = affine_gradients((weight, bias), needed[1:])
    written = [value for value in affine_grads if value is not None]
    if x.numel() == 0:
        return [*([torch.empty_like(x)] if needed[0] else []), *(value.zero_() for value in written)]
    saved = (*dense(weight, bias), means, rstds)
    with torch.cuda.device_of(x):
        if held_tile(x) is None:
            saved, activation = (*saved, None), ("leaky_relu", negative_slope)
            sums = add_parts(sums_in_parts(grad, x, saved, activation), torch.float32)
            x_grads = [map_gradient(grad, x, saved, sums, activation)] if needed[0] else []
        else:
            sums, x_grads = _held_gradients(grad, x, saved, negative_slope, needed[0])
        if written:
            add_samples(sums, affine_grads)
    return [*x_grads, *written]


def affine_gradients(affine: Affine, needed: Sequence[bool]) -> Affine:
    """Return where the gradients of weight and bias go; None for what is absent or not needed."""
    return [
        torch.empty(value.shape, dtype=value.dtype, device=value.device) if value is not None and need else None
        for value, need in zip(affine, needed, strict=True)
    ]


def add_samples(sums: Tensor, affine_grads: Affine, totals: Tensor | None = None) -> None:
    """Launch what adds up sums (N, 2, C) of samples or their parts: to the gradients of weight and bias, and totals."""
    launching.launch(
        _affine_gradients_kernel,
        (launching.cdiv(sums.shape[2], CHANNELS_AT_ONCE),),
        *(sums, *affine_grads, totals, sums.shape[0], sums.shape[2]),
        SAMPLES=SAMPLES_AT_ONCE,
        CHANNELS=CHANNELS_AT_ONCE,
        num_warps=THREADS // WARP_SIZE,
    )


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


def sums_in_parts(grad: Tensor, x: Tensor, saved: Saved, activation: Activation) -> Tensor:
    """Launch what reads large planes for their sums; return those of each part, (splits, B, 2, C)."""
    channels, pixels = tile_of(x)
    if x.stride(1) == 1 and unit_of(grad, x) == 1:  # what is moved one by one takes addresses: sm_120 spills registers
        pixels = max(1, pixels // 2)
    programs, splits, part = walk(x, channels, pixels)
    parts = torch.empty((splits, x.shape[0], 2, x.shape[1]), dtype=torch.float32, device=x.device)
    _launch_gradient(programs, grad, x, saved, None, parts, activation, (channels, pixels), (splits, part))
    return parts


@tuning.tunable(TILE_CHOICES, lambda grad, x, saved, sums, activation: map_key(x, activation[0]))
def map_gradient(
    choice: tuning.Choice, grad: Tensor, x: Tensor, saved: Saved, sums: Tensor | None, activation: Activation
) -> Tensor:
    """Launch what makes the gradient of large planes from sums that are known; None where statistics are constants."""
    x_grad, (channels, pixels) = torch.empty_like(x), tile_of(x, choice["tiles"])
    part = TILES_PER_PROGRAM * pixels
    splits = launching.cdiv(x.shape[2] * x.shape[3], part)
    programs = channel_blocks(x, channels) * splits
    _launch_gradient(programs, grad, x, saved, x_grad, sums, activation, (channels, pixels), (splits, part))
    return x_grad


def _launch_gradient(
    programs: int,
    grad: Tensor,
    x: Tensor,
    saved: Saved,
    x_grad: Tensor | None,
    sums: Tensor | None,
    activation: Activation,
    tile: tuple[int, int],
    parts: tuple[int, int],
) -> None:
    """Launch the kernel of large planes: to make the sums, or, with a gradient to write, to take them."""
    maps = (grad, x) if x_grad is None else (grad, x, x_grad)
    unit, (splits, part), per_sample = unit_of(*maps), parts, saved[2].ndim == 2
    values = x.shape[2] * x.shape[3] if per_sample else x.numel() // x.shape[1]
    launching.launch(
        _gradient_kernel,
        (programs,),
        *(grad, x, *saved, x_grad, sums, *map_sizes(x, unit), 2 * x.shape[0] * x.shape[1], values, part),
        activation[1],
        *(strides_of(m, unit) for m in (grad, x, maps[-1])),
        splits,
        CHANNELS=tile[0],
        PIXELS=tile[1],
        FLAT=is_flat(*maps),
        UNIT=unit,
        PER_SAMPLE=per_sample,
        ACTIVATION=activation[0],
        num_warps=THREADS // WARP_SIZE,
    )
