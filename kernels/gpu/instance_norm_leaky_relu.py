"""Triton kernels of instance norm and leaky rectifier, forward: one launch for planes that a program holds, or two.

Programs work on the tiles of `maps`. Where the whole planes of a tile's channels fit into a program's registers, one
launch reads and writes every map once. Larger planes are read twice: for their statistics, and to be normalised; a
launch in between merges the parts of the statistics, where there are several.

What walks over large planes serves batch norms as well, whose statistics are one per channel, and other activations.

The statistics are in float32. In registers the mean comes first, then the squares of what differs from it. Over many
tiles, every lane keeps a running mean and the squares around it (Welford, 1962); lanes and parts are merged by their
counts and means (Chan et al., 1979). All orders are fixed, and there are no atomics: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, held planes, B=32 C=128 H=64 W=64: 4.00 bytes per element, least 4.00; 15.6 us, floor 15.6 us
* forward, large planes, B=32 C=32 H=256 W=256: 6.00 bytes per element, least 4.00; 93.6 us, floor 62.4 us
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .maps import (
    LEAST_CHANNELS,
    THREADS,
    WARP_SIZE,
    channel_block,
    channel_blocks,
    is_flat,
    map_key,
    map_pointers,
    part_programs,
    strides_of,
    tile_of,
    unit_of,
)

MOST_HELD = 1 << 14  # elements of the planes that one program holds in its registers
HELD_PER_THREAD = 32  # of them at most
STATISTICS_TILES = 2  # at once, of a program that walks over a large plane
FORWARD_CHOICES = ({"tiles": 2}, {"tiles": 1})  # at once, of one that normalises
TILES_PER_PROGRAM = 8  # or twos of tiles, of one that adds nothing up: what it computes per channel serves all
ROWS = 256  # of samples and channels, merged by one program
Affine = Sequence[Tensor | None]
# Means and reciprocal deviations, (B, C) or (C,), and None; or means and variances, and what is added to these.
Statistics = tuple[Tensor, Tensor, float | None]
Activation = tuple[str, float]  # "leaky_relu", "relu" or "gelu"; the slope of the first


@triton.jit
def scale_and_shift(weight, bias, rstd, c, exists):
    """Return the factor of what differs from the mean, and what is added then, in float32; both may be absent."""
    scale, shift = rstd, tl.zeros_like(rstd)
    if weight is not None:
        scale = rstd * tl.load(weight + c, mask=exists, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, mask=exists, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def statistics_of(means, rstds, eps, b, c, channels, exists, PER_SAMPLE: tl.constexpr):
    """Return the means and reciprocal deviations of channels, in float32; with eps, what is given are variances."""
    if PER_SAMPLE:
        means += b * channels
        rstds += b * channels
    mean = tl.load(means + c, mask=exists, other=0.0).to(tl.float32)
    rstd = tl.load(rstds + c, mask=exists, other=0.0).to(tl.float32)
    if eps is not None:
        rstd = tl.rsqrt(rstd + eps)
    return mean, rstd


@triton.jit
def normal_cdf(z):
    """Return the share of a normal distribution below z."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def activate(z, negative_slope, ACTIVATION: tl.constexpr):
    """Return what an activation makes of z."""
    if ACTIVATION == "gelu":
        activated = z * normal_cdf(z)
    elif ACTIVATION == "relu":
        activated = tl.where(z <= 0, 0.0, z)
    else:
        activated = tl.where(z > 0, z, z * negative_slope)
    return activated


@triton.jit
def _held_fwd_kernel(
    x,
    weight,  # (C,), or None
    bias,  # (C,), or None
    out,
    means,  # (B, C)
    rstds,  # (B, C)
    channel_units,
    width,
    pixels,
    eps,
    negative_slope,
    x_strides,
    out_strides,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,  # at least all pixels
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    b, c, channel_exists = channel_block(tl.program_id(0), channels, CHANNELS)
    p = tl.arange(0, PIXELS)
    exists = channel_exists[:, None] & (p < pixels)[None, :]
    values = tl.load(map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT), mask=exists, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1) / pixels
    centred = tl.where(exists, values - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / pixels + eps)
    row = b * channels + c
    tl.store(means + row, mean, mask=channel_exists)
    tl.store(rstds + row, rstd, mask=channel_exists)
    scale, shift = scale_and_shift(weight, bias, rstd, c, channel_exists)
    normalised = centred * scale[:, None] + shift[:, None]
    activated = activate(normalised, negative_slope, "leaky_relu")
    tl.store(
        map_pointers(out, out_strides, b, c, p, width, FLAT, UNIT), activated.to(out.dtype.element_ty), mask=exists
    )


@triton.jit(do_not_specialize=["splits"])
def _statistics_kernel(
    x,
    means,  # (splits, B * C): each part's mean
    spreads,  # (splits, B * C): each part's squares around it, summed; with eps, of a single part what becomes of them
    channel_units,
    width,
    pixels,
    rows,  # B * C
    part_pixels,  # a multiple of PIXELS
    eps,  # or None
    x_strides,
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
    last = tl.minimum(first + part_pixels, pixels)
    lane_means = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    lane_spreads = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    seen = 0.0
    for start in range(first, last, PIXELS):
        p = start + tl.arange(0, PIXELS)
        exists = channel_exists[:, None] & (p < last)[None, :]
        source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
        values = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        share = 1.0 / (seen + 1.0)
        delta = tl.where(exists, values - lane_means, 0.0)
        lane_means += delta * share
        lane_spreads += delta * delta * (seen * share)
        seen += 1.0
    lane_counts = ((last - first - tl.arange(0, PIXELS) + PIXELS - 1) // PIXELS).to(tl.float32)[None, :]
    mean = tl.sum(lane_means * lane_counts, axis=1) / (last - first)
    away = lane_means - mean[:, None]
    spread = tl.sum(lane_spreads + away * away * lane_counts, axis=1)
    row = split.to(tl.int64) * rows + b * channels + c
    tl.store(means + row, mean, mask=channel_exists)
    if eps is not None:
        spread = tl.where(splits == 1, tl.rsqrt(spread / pixels + eps), spread)
    tl.store(spreads + row, spread, mask=channel_exists)


@triton.jit(do_not_specialize=["splits"])
def _merge_statistics_kernel(
    part_means, part_spreads, means, rstds, rows, pixels, part_pixels, eps, splits, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    mean = tl.zeros((ROWS,), dtype=tl.float32)
    spread = tl.zeros((ROWS,), dtype=tl.float32)
    seen = 0.0
    place = row.to(tl.int64)
    for _ in range(splits):
        count = tl.minimum(pixels - seen, part_pixels)
        delta = tl.load(part_means + place, mask=exists, other=0.0) - mean
        share = count / (seen + count)
        mean += delta * share
        spread += tl.load(part_spreads + place, mask=exists, other=0.0) + delta * delta * (seen * share)
        seen += count
        place += rows
    tl.store(means + row, mean, mask=exists)
    tl.store(rstds + row, tl.rsqrt(spread / pixels + eps), mask=exists)


@triton.jit(do_not_specialize=["splits"])
def _normalise_kernel(
    x,
    weight,
    bias,
    means,  # (B, C), or (C,)
    rstds,  # likewise; with eps, variances
    eps,  # or None
    out,
    channel_units,
    width,
    pixels,
    part_pixels,
    negative_slope,
    x_strides,
    out_strides,
    splits,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = channel_units * UNIT
    b, c, channel_exists = channel_block(tl.program_id(0) // splits, channels, CHANNELS)
    first = (tl.program_id(0) % splits) * part_pixels
    mean, rstd = statistics_of(means, rstds, eps, b, c, channels, channel_exists, PER_SAMPLE)
    scale, shift = scale_and_shift(weight, bias, rstd, c, channel_exists)
    for start in range(first, tl.minimum(first + part_pixels, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        exists = channel_exists[:, None] & (p < pixels)[None, :]
        source = map_pointers(x, x_strides, b, c, p, width, FLAT, UNIT)
        centred = tl.load(source, mask=exists, other=0.0).to(tl.float32) - mean[:, None]
        normalised = centred * scale[:, None] + shift[:, None]
        activated = activate(normalised, negative_slope, ACTIVATION)
        target = map_pointers(out, out_strides, b, c, p, width, FLAT, UNIT)
        tl.store(target, activated.to(out.dtype.element_ty), mask=exists)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernels.

    Returns:
        The result, and what backward needs: the means (B, C), and the reciprocals of the deviations, in float32.
    """
    means, rstds = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return torch.empty_like(x), means.zero_(), rstds.zero_()
    tile, affine = held_tile(x), dense(weight, bias)
    with torch.cuda.device_of(x):
        if tile is None:
            _make_statistics(x, means, rstds, eps)
            return normalise(x, affine, (means, rstds, None), ("leaky_relu", negative_slope)), means, rstds
        out = torch.empty_like(x)
        unit = unit_of(x, out)
        launching.launch(
            _held_fwd_kernel,
            (channel_blocks(x, tile[0]),),
            *(x, *affine, out, means, rstds, *map_sizes(x, unit), eps, negative_slope),
            *(strides_of(x, unit), strides_of(out, unit)),
            **held_settings(tile),
            FLAT=is_flat(x, out),
            UNIT=unit,
        )
    return out, means, rstds


@tuning.tunable(FORWARD_CHOICES, lambda x, affine, statistics, activation: map_key(x, activation[0]))
def normalise(
    choice: tuning.Choice, x: Tensor, affine: Affine, statistics: Statistics, activation: Activation
) -> Tensor:
    """Launch what normalises large planes by statistics that are known, and what follows."""
    out = torch.empty_like(x)
    tiles = 1 if activation[0] == "gelu" else choice["tiles"]  # of two at once, sm_120 spills registers
    unit, (channels, pixels) = unit_of(x, out), tile_of(x, tiles)
    sizes, part = map_sizes(x, unit), TILES_PER_PROGRAM * pixels
    splits = launching.cdiv(sizes[2], part)
    launching.launch(
        _normalise_kernel,
        (channel_blocks(x, channels) * splits,),
        *(x, *affine, *statistics, out, *sizes, part, activation[1]),
        *(strides_of(x, unit), strides_of(out, unit), splits),
        CHANNELS=channels,
        PIXELS=pixels,
        FLAT=is_flat(x, out),
        UNIT=unit,
        PER_SAMPLE=statistics[0].ndim == 2,
        ACTIVATION=activation[0],
        num_warps=THREADS // WARP_SIZE,
    )
    return out


def _make_statistics(x: Tensor, means: Tensor, rstds: Tensor, eps: float) -> None:
    """Launch what makes the means and reciprocal deviations of large planes, in parts or at once."""
    *parts, part = statistics_in_parts(x, (means, rstds, eps))
    if parts[0] is not means:
        rows, (splits, *_) = means.numel(), parts[0].shape
        launching.launch(
            _merge_statistics_kernel,
            (launching.cdiv(rows, ROWS),),
            *(*parts, means, rstds, rows, x.shape[2] * x.shape[3], part, eps, splits),
            ROWS=ROWS,
            num_warps=THREADS // WARP_SIZE,
        )


def statistics_in_parts(x: Tensor, whole: Statistics | None = None) -> tuple[Tensor, Tensor, int]:
    """Launch what reads large planes for their statistics.

    Args:
        x: maps (B, C, H, W).
        whole: where a single part's means and reciprocal deviations go, (B, C), and what is added to its variance.

    Returns:
        Each part's means, and its squares around them, (splits, B, C), and the pixels of a part; or what ``whole`` has.
    """
    channels, pixels = tile_of(x, STATISTICS_TILES)
    programs, splits, part = walk(x, channels, pixels)
    unit, eps = unit_of(x), None if whole is None else whole[2]
    if whole is not None and splits == 1:
        part_means, spreads, _ = whole
    else:
        part_means, spreads = (
            torch.empty((splits, *x.shape[:2]), dtype=torch.float32, device=x.device) for _ in range(2)
        )
    launching.launch(
        _statistics_kernel,
        (programs,),
        *(x, part_means, spreads, *map_sizes(x, unit), x.shape[0] * x.shape[1], part, eps, strides_of(x, unit), splits),
        CHANNELS=channels,
        PIXELS=pixels,
        FLAT=is_flat(x),
        UNIT=unit,
        num_warps=THREADS // WARP_SIZE,
    )
    return part_means, spreads, part


def dense(weight: Tensor | None, bias: Tensor | None) -> Affine:
    """Return weight and bias without gaps in memory."""
    return [value if value is None else value.contiguous() for value in (weight, bias)]


def held_tile(x: Tensor) -> tuple[int, int] | None:
    """Return the channels and pixels of a tile of whole planes that a program can hold; None if they are too large."""
    channels, _ = tile_of(x)
    pixels = launching.next_power_of_2(x.shape[2] * x.shape[3])
    least = min(channels, LEAST_CHANNELS if x.stride(1) == 1 and x.stride(3) != 1 else 1)
    while channels > least and channels * pixels > HELD_PER_THREAD * THREADS:
        channels //= 2
    return (channels, pixels) if channels * pixels <= MOST_HELD else None


def held_settings(tile: tuple[int, int]) -> dict[str, int]:
    """Return what kernels of held planes are compiled for: the tile, and enough warps to hold it."""
    channels, pixels = tile
    threads = max(THREADS, channels * pixels // HELD_PER_THREAD)
    return {"CHANNELS": channels, "PIXELS": pixels, "num_warps": threads // WARP_SIZE}


def map_sizes(x: Tensor, unit: int) -> tuple[int, int, int]:
    """Return the channels of x (B, C, H, W) in units, its width and its pixels."""
    return x.shape[1] // unit, x.shape[3], x.shape[2] * x.shape[3]


def walk(x: Tensor, channels: int, pixels: int) -> tuple[int, int, int]:
    """Return how many programs add something up over the pixels of x, in how many parts, and the pixels of a part."""
    programs, splits = part_programs(x, channels, pixels)
    tiles = launching.cdiv(x.shape[2] * x.shape[3], pixels)
    return programs, splits, launching.cdiv(tiles, splits) * pixels
