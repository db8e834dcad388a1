"""Triton kernels of batch norm and activation, backward: the sums of all samples, and the map's gradient from these.

Those are kernels of instance norm, on its tiles: see there. Of small maps one program makes both for its channels, in a
single launch, and caches serve what it reads again. The normalised map, and with it what the activation did, is
computed anew from the map and its statistics: nothing else was kept. No atomics: results repeat bit for bit. In
evaluation, where the statistics are constants, the map's gradient needs no sums.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* backward, training, B=32 C=64 H=256 W=256: 10.00 bytes per element, least 6.00; 312.1 us, floor 187.3 us
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .batch_norm_activation import sample_tile, small_tile
from .instance_norm_leaky_relu import Affine, dense, map_sizes, scale_and_shift, statistics_of
from .instance_norm_leaky_relu_backward import (
    Saved,
    add_samples,
    affine_gradients,
    map_gradient,
    sums_in_parts,
    through_activation,
)
from .maps import THREADS, WARP_SIZE, is_flat, map_pointers, strides_of, unit_of


@triton.jit
def _small_maps_bwd_kernel(
    grad,
    x,
    weight,
    bias,
    means,  # (C,)
    rstds,  # (C,); with eps, variances
    eps,  # or None; with it the statistics are constants
    x_grad,  # or None
    weight_grad,  # (C,), or None
    bias_grad,  # (C,), or None
    batch,
    channel_units,
    width,
    pixels,
    values,  # B * pixels
    grad_strides,
    x_strides,
    x_grad_strides,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = channel_units * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_exists = c < channels
    tiles = tl.cdiv(pixels, PIXELS)
    mean, rstd = statistics_of(means, rstds, eps, 0, c, channels, channel_exists, False)
    scale, shift = scale_and_shift(weight, bias, rstd, c, channel_exists)
    product_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    grad_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for tile in range(batch * tiles):
        b, p, exists = sample_tile(tile, tiles, pixels, channel_exists, PIXELS)
        source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
        centred = tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean[:, None]
        source = map_pointers(grad, grad_strides, b, c, p, width, FLAT, UNIT)
        incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        incoming = through_activation(incoming, centred * scale[:, None] + shift[:, None], 0.0, ACTIVATION)
        product_sums += incoming * centred
        grad_sums += incoming
    product_sum, grad_sum = tl.sum(product_sums, axis=1) * rstd, tl.sum(grad_sums, axis=1)
    if weight_grad is not None:
        tl.store(weight_grad + c, product_sum.to(weight_grad.dtype.element_ty), mask=channel_exists)
    if bias_grad is not None:
        tl.store(bias_grad + c, grad_sum.to(bias_grad.dtype.element_ty), mask=channel_exists)
    if x_grad is not None:
        of_centred, of_all = product_sum * rstd / values, grad_sum / values
        for tile in range(batch * tiles):
            b, p, exists = sample_tile(tile, tiles, pixels, channel_exists, PIXELS)
            source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
            centred = tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean[:, None]
            source = map_pointers(grad, grad_strides, b, c, p, width, FLAT, UNIT)
            incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
            incoming = through_activation(incoming, centred * scale[:, None] + shift[:, None], 0.0, ACTIVATION)
            if eps is None:
                incoming = incoming - of_all[:, None] - centred * of_centred[:, None]
            target = map_pointers(x_grad, x_grad_strides, b, c, p, width, FLAT, UNIT)
            tl.store(target, (scale[:, None] * incoming).to(x_grad.dtype.element_ty), mask=exists)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    eps: float | None,
    activation: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Launch the backward kernels; return those gradients of x, weight and bias that are needed.

    With ``eps``, statistics are running ones, which are constants: means, and variances instead of ``rstds``.
    """
    affine_grads = affine_gradients((weight, bias), needed[1:])
    written = [value for value in affine_grads if value is not None]
    if x.numel() == 0:
        return [*([torch.empty_like(x)] if needed[0] else []), *(value.zero_() for value in written)]
    saved, tile = (*dense(weight, bias), *dense(means, rstds), eps), small_tile(x)
    with torch.cuda.device_of(x):
        if tile is None:
            x_grads = _large_gradients(grad, x, saved, affine_grads, activation, needed[0])
        else:
            x_grads = _small_gradients(grad, x, saved, affine_grads, activation, needed[0], tile)
    return [*x_grads, *written]


def _small_gradients(
    grad: Tensor,
    x: Tensor,
    saved: Saved,
    affine_grads: Affine,
    activation: str,
    needs_x: bool,
    tile: tuple[int, int],
) -> list[Tensor]:
    """Launch the kernel of small maps; return the gradient of the map if it is needed."""
    x_grads = [torch.empty_like(x)] if needs_x else []
    maps = (grad, x, *x_grads)
    unit = unit_of(*maps)
    launching.launch(
        _small_maps_bwd_kernel,
        (launching.cdiv(x.shape[1], tile[0]),),
        *(grad, x, *saved, x_grads[0] if needs_x else None, *affine_grads),
        *(x.shape[0], *map_sizes(x, unit), x.numel() // x.shape[1]),
        *(strides_of(m, unit) for m in (grad, x, maps[-1])),
        CHANNELS=tile[0],
        PIXELS=tile[1],
        FLAT=is_flat(*maps),
        UNIT=unit,
        ACTIVATION=activation,
        num_warps=THREADS // WARP_SIZE,
    )
    return x_grads


def _large_gradients(
    grad: Tensor, x: Tensor, saved: Saved, affine_grads: Affine, activation: str, needs_x: bool
) -> list[Tensor]:
    """Launch the kernels of instance norm; return the gradient of the map if it is needed."""
    of_batch, form = needs_x and saved[-1] is None, (activation, 0.0)
    totals = torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device) if of_batch else None
    if of_batch or any(value is not None for value in affine_grads):
        add_samples(sums_in_parts(grad, x, saved, form).flatten(0, 1), affine_grads, totals)
    return [map_gradient(grad, x, saved, totals, form)] if needs_x else []
