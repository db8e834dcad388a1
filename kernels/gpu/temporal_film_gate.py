"""Triton kernels of the temporal FiLM gate: one affine map per sample and channel.

Programs work on the tiles that all kernels of maps share (`maps`): pixels of one or a few channels, or channels of a
few pixels in channels-last maps, 16 bytes per thread at once where sizes and strides allow it. Each program works its
channels' two coefficients out from the five arguments; the ECG's map is never made, and nothing is copied.

Backward takes two launches. The first reads the gradient and the map, writes the map's gradient, and sums the gradient
and its product with the map over each program's pixels, in a fixed order. The second, a program per sample, adds up the
parts of channels that were cut, in their order, and writes the gradients of ecg, weights, scale and shift. No atomics:
results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 C=256 H=32 W=32: 4.00 bytes per element, least 4.00; 7.8 us, floor 7.8 us
* backward, B=32 C=256 H=32 W=32: 6.00 bytes per element, least 6.00; 11.7 us, floor 11.7 us
With the ECG's map written out, forward would move a third more, and so would backward twice.
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
    is_flat,
    map_key,
    part_programs,
    pixel_offsets,
    row_strides,
    strides_of,
    tile_of,
    tiles_sharing,
    unit_of,
)

CHANNELS_AT_ONCE = 256  # of a sample, in the launch that follows the sums


@triton.jit
def _load_row(values, b, c, stride_b, stride_c, exists):
    """Load one value per channel of a tensor (B, C), in float32."""
    pointers = values + b * stride_b + c.to(tl.int64) * stride_c
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _temporal_film_fwd_kernel(
    features,
    ecg,
    weights,
    scale,
    shift,
    out,
    channel_units,
    width,
    pixels,
    features_stride_b,
    features_stride_c,
    features_stride_h,
    features_stride_w,
    out_stride_b,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    ecg_stride_b,
    ecg_stride_c,
    weights_stride_b,
    weights_stride_k,
    scale_stride_b,
    scale_stride_c,
    shift_stride_b,
    shift_stride_c,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    blocks = tl.cdiv(pixels, PIXELS)
    b, c, channel_exists = channel_block(tl.program_id(0) // blocks, channels, CHANNELS)
    p = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)
    exists = channel_exists[:, None] & (p < pixels)[None, :]
    wide_c = c.to(tl.int64)[:, None]
    source = features + b * (features_stride_b * UNIT) + wide_c * features_stride_c
    source += pixel_offsets(p, width, features_stride_h, features_stride_w, FLAT, UNIT)[None, :]
    values = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    modulation = 1.0 + _load_row(scale, b, c, scale_stride_b * UNIT, scale_stride_c, channel_exists)
    w_mri = tl.load(weights + b * weights_stride_b).to(tl.float32)
    w_ecg = tl.load(weights + b * weights_stride_b + weights_stride_k).to(tl.float32)
    spread = w_ecg * _load_row(ecg, b, c, ecg_stride_b * UNIT, ecg_stride_c, channel_exists)
    added = spread * modulation + _load_row(shift, b, c, shift_stride_b * UNIT, shift_stride_c, channel_exists)
    values = values * (1.0 + w_mri * modulation)[:, None] + added[:, None]
    target = out + b * (out_stride_b * UNIT) + wide_c * out_stride_c
    target += pixel_offsets(p, width, out_stride_h, out_stride_w, FLAT, UNIT)[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["splits"])
def _temporal_film_bwd_kernel(
    grad,
    features,  # or None: then only the map's gradient is made
    weights,
    scale,
    features_grad,  # or None
    sums,  # (splits, 2, B * C): each part's sum of grad and of grad * features; not touched without features
    channel_units,
    width,
    pixels,
    rows,  # B * C
    grad_stride_b,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    features_stride_b,
    features_stride_c,
    features_stride_h,
    features_stride_w,
    features_grad_stride_b,
    features_grad_stride_c,
    features_grad_stride_h,
    features_grad_stride_w,
    weights_stride_b,
    scale_stride_b,
    scale_stride_c,
    splits,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    split = tl.program_id(0) % splits
    b, c, channel_exists = channel_block(tl.program_id(0) // splits, channels, CHANNELS)
    wide_c = c.to(tl.int64)[:, None]
    grads = grad + b * (grad_stride_b * UNIT) + wide_c * grad_stride_c
    w_mri = tl.load(weights + b * weights_stride_b).to(tl.float32)
    a = 1.0 + w_mri * (1.0 + _load_row(scale, b, c, scale_stride_b * UNIT, scale_stride_c, channel_exists))
    grad_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    product_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for start in range(split * PIXELS, pixels, splits * PIXELS):
        p = start + tl.arange(0, PIXELS)
        exists = channel_exists[:, None] & (p < pixels)[None, :]
        source = grads + pixel_offsets(p, width, grad_stride_h, grad_stride_w, FLAT, UNIT)[None, :]
        incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        if features is not None:
            source = features + b * (features_stride_b * UNIT) + wide_c * features_stride_c
            source += pixel_offsets(p, width, features_stride_h, features_stride_w, FLAT, UNIT)[None, :]
            grad_sums += incoming
            product_sums += incoming * tl.load(source, mask=exists, other=0.0).to(tl.float32)
        if features_grad is not None:
            outgoing = features_grad + b * (features_grad_stride_b * UNIT) + wide_c * features_grad_stride_c
            outgoing += pixel_offsets(p, width, features_grad_stride_h, features_grad_stride_w, FLAT, UNIT)[None, :]
            tl.store(outgoing, (incoming * a[:, None]).to(features_grad.dtype.element_ty), mask=exists)
    if features is not None:
        target = sums + split.to(tl.int64) * 2 * rows + b * channels + c
        tl.store(target, tl.sum(grad_sums, axis=1), mask=channel_exists)
        tl.store(target + rows, tl.sum(product_sums, axis=1), mask=channel_exists)


@triton.jit(do_not_specialize=["splits"])
def _temporal_film_small_bwd_kernel(
    sums,  # (splits, 2, B * C)
    ecg,
    weights,
    scale,
    ecg_grad,  # this and the following contiguous
    weights_grad,
    scale_grad,
    shift_grad,
    channels,
    rows,  # B * C
    ecg_stride_b,
    ecg_stride_c,
    weights_stride_b,
    weights_stride_k,
    scale_stride_b,
    scale_stride_c,
    splits,
    CHANNELS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    w_mri = tl.load(weights + b * weights_stride_b).to(tl.float32)
    w_ecg = tl.load(weights + b * weights_stride_b + weights_stride_k).to(tl.float32)
    mri_sums = tl.zeros((CHANNELS,), dtype=tl.float32)
    ecg_sums = tl.zeros((CHANNELS,), dtype=tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        exists = c < channels
        grad_sum = tl.zeros((CHANNELS,), dtype=tl.float32)
        product_sum = tl.zeros((CHANNELS,), dtype=tl.float32)
        part = sums + b * channels + c
        for _ in range(splits):
            grad_sum += tl.load(part, mask=exists, other=0.0)
            product_sum += tl.load(part + rows, mask=exists, other=0.0)
            part += 2 * rows
        modulation = 1.0 + _load_row(scale, b, c, scale_stride_b, scale_stride_c, exists)
        values = _load_row(ecg, b, c, ecg_stride_b, ecg_stride_c, exists)
        mri_sums += modulation * product_sum
        ecg_sums += modulation * values * grad_sum
        row = b * channels + c
        tl.store(ecg_grad + row, (w_ecg * modulation * grad_sum).to(ecg_grad.dtype.element_ty), mask=exists)
        mixed_sum = w_mri * product_sum + w_ecg * values * grad_sum
        tl.store(scale_grad + row, mixed_sum.to(scale_grad.dtype.element_ty), mask=exists)
        tl.store(shift_grad + row, grad_sum.to(shift_grad.dtype.element_ty), mask=exists)
    tl.store(weights_grad + 2 * b, tl.sum(mri_sums, axis=0).to(weights_grad.dtype.element_ty))
    tl.store(weights_grad + 2 * b + 1, tl.sum(ecg_sums, axis=0).to(weights_grad.dtype.element_ty))


@tuning.tunable(TILE_CHOICES, lambda features, *small: map_key(features))
def forward(
    choice: tuning.Choice, features: Tensor, ecg: Tensor, weights: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """Launch the forward kernel."""
    out = torch.empty_like(features)
    if out.numel() == 0:
        return out
    positions, unit = features.shape[2] * features.shape[3], unit_of(features, out, rows=(ecg, scale, shift))
    channels, pixels = tile_of(features, choice["tiles"] * tiles_sharing(unit))
    programs = features.shape[0] * launching.cdiv(features.shape[1], channels) * launching.cdiv(positions, pixels)
    with torch.cuda.device_of(features):
        launching.launch(
            _temporal_film_fwd_kernel,
            (programs,),
            features,
            ecg,
            weights,
            scale,
            shift,
            out,
            features.shape[1] // unit,
            features.shape[3],
            positions,
            *strides_of(features, unit),
            *strides_of(out, unit),
            *row_strides(ecg, unit),
            *weights.stride(),
            *row_strides(scale, unit),
            *row_strides(shift, unit),
            CHANNELS=channels,
            PIXELS=pixels,
            FLAT=is_flat(features, out),
            UNIT=unit,
            num_warps=THREADS // WARP_SIZE,
        )
    return out


def backward(
    grad: Tensor,
    features: Tensor | None,
    ecg: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
    needs_features: bool,
) -> list[Tensor]:
    """Launch the backward kernels.

    Returns:
        With features, the gradients of ecg, weights, scale and shift; then that of the features, if it is needed.
    """
    like = grad if features is None else features
    map_grads = [torch.empty_like(like)] if needs_features else []
    small = () if features is None else (ecg, weights, scale, shift)
    if grad.numel() == 0:
        return [*(value.new_zeros(value.shape) for value in small), *map_grads]
    maps = (grad, *(() if features is None else (features,)), *map_grads)
    map_grad, unit = map_grads[0] if needs_features else None, unit_of(*maps, rows=(scale,))
    channels, pixels = tile_of(like)  # of two tiles at once, sm_100 spills a register
    programs, splits = part_programs(like, channels, pixels)
    sums = torch.empty((splits, 2, *scale.shape), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        launching.launch(
            _temporal_film_bwd_kernel,
            (programs,),
            grad,
            features,
            weights,
            scale,
            map_grad,
            sums,
            grad.shape[1] // unit,
            grad.shape[3],
            grad.shape[2] * grad.shape[3],
            scale.numel(),
            *strides_of(grad, unit),
            *strides_of(like, unit),
            *strides_of(like if map_grad is None else map_grad, unit),
            weights.stride(0),
            *row_strides(scale, unit),
            splits,
            CHANNELS=channels,
            PIXELS=pixels,
            FLAT=is_flat(*maps),
            UNIT=unit,
            num_warps=THREADS // WARP_SIZE,
        )
        return [*(_small_gradients(sums, ecg, weights, scale, shift) if small else ()), *map_grads]


def _small_gradients(sums: Tensor, ecg: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    grads = [value.new_empty(value.shape) for value in (ecg, weights, scale, shift)]
    launching.launch(
        _temporal_film_small_bwd_kernel,
        (len(ecg),),
        sums,
        ecg,
        weights,
        scale,
        *grads,
        ecg.shape[1],
        ecg.numel(),
        *ecg.stride(),
        *weights.stride(),
        *scale.stride(),
        len(sums),
        CHANNELS=CHANNELS_AT_ONCE,
        num_warps=THREADS // WARP_SIZE,
    )
    return grads
