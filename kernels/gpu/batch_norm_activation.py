"""Triton kernels of batch norm and activation, forward: statistics, their merging, and the map that they normalise.

The maps are read, and written, by the kernels of instance norm that walk over large planes. Here every sample, or part
of one, is a part of its channels' statistics, and one launch merges all parts of a channel by their counts and means
(Chan et al., 1979) and brings the running statistics up to date. Of small maps one program does all that for its
channels in a single launch, and caches serve what it reads again. In evaluation one launch takes the running
statistics. All orders are fixed, and there are no atomics: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, training, B=32 C=64 H=256 W=256: 6.00 bytes per element, least 4.00; 187.3 us, floor 124.8 us
* forward, evaluation, B=32 C=64 H=256 W=256: 4.00 bytes per element, least 4.00; 124.8 us, floor 124.8 us
The mean of a channel needs all samples before the first number can be written, so that a map that no cache holds is
read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .instance_norm_leaky_relu import (
    Affine,
    activate,
    dense,
    map_sizes,
    normalise,
    scale_and_shift,
    statistics_in_parts,
)
from .maps import THREADS, WARP_SIZE, is_flat, map_pointers, strides_of, tile_of, unit_of

MOST_TILES = 8  # of all samples, that one program reads, three times forward
PARTS_AT_ONCE, CHANNELS_AT_ONCE = 64, 16  # of the statistics that one program merges


@triton.jit
def take_in(running_mean, running_var, mean, spread, values, momentum, c, exists):
    """Bring running statistics up to date with a batch's mean and its squares around it; both may be absent."""
    if running_mean is not None:
        before = tl.load(running_mean + c, mask=exists, other=0.0).to(tl.float32)
        after = (1.0 - momentum) * before + momentum * mean
        tl.store(running_mean + c, after.to(running_mean.dtype.element_ty), mask=exists)
        before = tl.load(running_var + c, mask=exists, other=0.0).to(tl.float32)
        after = (1.0 - momentum) * before + momentum * (spread / (values - 1))
        tl.store(running_var + c, after.to(running_var.dtype.element_ty), mask=exists)


@triton.jit
def sample_tile(tile, tiles, pixels, channel_exists, PIXELS: tl.constexpr):
    """Return the sample of a tile, one of so many per sample, its pixels, and which of its elements exist."""
    p = (tile % tiles) * PIXELS + tl.arange(0, PIXELS)
    return (tile // tiles).to(tl.int64), p, channel_exists[:, None] & (p < pixels)[None, :]


@triton.jit
def _small_maps_fwd_kernel(
    x,
    weight,  # (C,), or None
    bias,  # (C,), or None
    running_mean,  # (C,), or None
    running_var,  # (C,), or None
    means,  # (C,)
    rstds,  # (C,)
    out,
    batch,
    channel_units,
    width,
    pixels,
    values,  # B * pixels
    eps,
    momentum,
    x_strides,
    out_strides,
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
    sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for tile in range(batch * tiles):
        b, p, exists = sample_tile(tile, tiles, pixels, channel_exists, PIXELS)
        source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
        sums += tl.load(source, mask=exists, other=0.0).to(tl.float32)
    mean = tl.sum(sums, axis=1) / values
    sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for tile in range(batch * tiles):
        b, p, exists = sample_tile(tile, tiles, pixels, channel_exists, PIXELS)
        source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
        centred = tl.where(exists, tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean[:, None], 0.0)
        sums += centred * centred
    spread = tl.sum(sums, axis=1)
    rstd = tl.rsqrt(spread / values + eps)
    tl.store(means + c, mean, mask=channel_exists)
    tl.store(rstds + c, rstd, mask=channel_exists)
    take_in(running_mean, running_var, mean, spread, values, momentum, c, channel_exists)
    scale, shift = scale_and_shift(weight, bias, rstd, c, channel_exists)
    for tile in range(batch * tiles):
        b, p, exists = sample_tile(tile, tiles, pixels, channel_exists, PIXELS)
        source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
        centred = tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean[:, None]
        activated = activate(centred * scale[:, None] + shift[:, None], 0.0, ACTIVATION)
        target = map_pointers(out, out_strides, b, c, p, width, FLAT, UNIT)
        tl.store(target, activated.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _merge_batch_statistics_kernel(
    part_means,  # (splits, B, C)
    part_spreads,  # (splits, B, C): squares around those means, summed
    means,  # (C,)
    rstds,  # (C,)
    running_mean,  # (C,), or None
    running_var,  # (C,), or None
    parts,  # splits * B
    batch,
    channels,
    pixels,
    part_pixels,  # of every part of a sample but its last
    values,  # B * pixels
    eps,
    momentum,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    sums = tl.zeros((PARTS, CHANNELS), dtype=tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        counts = tl.minimum(pixels - part // batch * part_pixels, part_pixels).to(tl.float32)[:, None]
        place, there = part.to(tl.int64)[:, None] * channels + c[None, :], (part < parts)[:, None] & exists[None, :]
        sums += tl.load(part_means + place, mask=there, other=0.0) * counts
    mean = tl.sum(sums, axis=0) / values
    sums = tl.zeros((PARTS, CHANNELS), dtype=tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        counts = tl.minimum(pixels - part // batch * part_pixels, part_pixels).to(tl.float32)[:, None]
        place, there = part.to(tl.int64)[:, None] * channels + c[None, :], (part < parts)[:, None] & exists[None, :]
        away = tl.load(part_means + place, mask=there, other=0.0) - mean[None, :]
        sums += tl.where(there, tl.load(part_spreads + place, mask=there, other=0.0) + away * away * counts, 0.0)
    spread = tl.sum(sums, axis=0)
    tl.store(means + c, mean, mask=exists)
    tl.store(rstds + c, tl.rsqrt(spread / values + eps), mask=exists)
    take_in(running_mean, running_var, mean, spread, values, momentum, c, exists)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernels; in training they bring the running statistics up to date where they are.

    Returns:
        The result, and what backward needs of training: the means (C,), and the reciprocals of the deviations, in
        float32. In evaluation these two are empty.
    """
    size = x.shape[1] if training else 0
    means, rstds = (torch.empty(size, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return torch.empty_like(x), means.zero_(), rstds.zero_()
    with torch.cuda.device_of(x):
        if not training:
            assert running_mean is not None
            assert running_var is not None
            statistics = (running_mean.contiguous(), running_var.contiguous(), eps)
            return normalise(x, dense(weight, bias), statistics, (activation, 0.0)), means, rstds
        running, tile = dense(running_mean, running_var), small_tile(x)
        if tile is None:
            _make_statistics(x, running, means, rstds, momentum, eps)
            out = normalise(x, dense(weight, bias), (means, rstds, None), (activation, 0.0))
        else:
            out = torch.empty_like(x)
            unit = unit_of(x, out)
            launching.launch(
                _small_maps_fwd_kernel,
                (launching.cdiv(x.shape[1], tile[0]),),
                *(x, *dense(weight, bias), *running, means, rstds, out, x.shape[0], *map_sizes(x, unit)),
                *(x.numel() // x.shape[1], eps, momentum, strides_of(x, unit), strides_of(out, unit)),
                CHANNELS=tile[0],
                PIXELS=tile[1],
                FLAT=is_flat(x, out),
                UNIT=unit,
                ACTIVATION=activation,
                num_warps=THREADS // WARP_SIZE,
            )
        for kept, updated in zip((running_mean, running_var), running, strict=True):
            if kept is not None and updated is not None and kept is not updated:  # whose numbers lie apart
                kept.copy_(updated)
    return out, means, rstds


def _make_statistics(x: Tensor, running: Affine, means: Tensor, rstds: Tensor, momentum: float, eps: float) -> None:
    """Launch what makes the statistics of a batch, and takes them into the running ones."""
    *parts, part_pixels = statistics_in_parts(x)
    (splits, batch, channels), pixels = parts[0].shape, x.shape[2] * x.shape[3]
    launching.launch(
        _merge_batch_statistics_kernel,
        (launching.cdiv(channels, CHANNELS_AT_ONCE),),
        *(*parts, means, rstds, *running, splits * batch, batch, channels, pixels, part_pixels),
        *(batch * pixels, eps, momentum),
        PARTS=PARTS_AT_ONCE,
        CHANNELS=CHANNELS_AT_ONCE,
        num_warps=THREADS // WARP_SIZE,
    )


def small_tile(x: Tensor) -> tuple[int, int] | None:
    """Return the channels and pixels of a tile where one program reads all samples of its channels; None if many."""
    channels, pixels = tile_of(x)
    tiles = x.shape[0] * launching.cdiv(x.shape[2] * x.shape[3], pixels)
    return (channels, pixels) if tiles <= MOST_TILES else None
