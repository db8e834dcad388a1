"""What all kernels of maps (B, C, H, W) share: tiles, strides in units, and sums in parts.

Programs work on tiles of CHANNELS x PIXELS elements of one sample. The tile lies along whatever is contiguous: pixels
of one or a few channels, or, in channels-last maps, channels of a few pixels. Maps are taken with the strides they
have. In channels-last maps these, and the channels themselves, are counted in units of 16 bytes where all of them are
multiples of it: a compiler proves divisibility by 16 elements alone, and would move 72 channels one by one.

A sum over the pixels of a channel runs inside one program, in a fixed order. Channels of many pixels but too few to
fill a GPU are cut into parts, whose sums a second launch adds up in a fixed order.
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
TILES_PER_PART = 16  # of a channel's pixels, where there are fewer programs than fill a GPU
ENOUGH_PROGRAMS = 1024  # fixed, so that the order of summation does not depend on the device
TILES_SHARING = 2  # of those that lie along the channels


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
def map_pointers(x, strides, b, c, p, width, FLAT: tl.constexpr, UNIT: tl.constexpr):
    """Return pointers (channels, pixels) into a map (B, C, H, W)."""
    rows = x + b * (strides[0] * UNIT) + c.to(tl.int64)[:, None] * strides[1]
    return rows + pixel_offsets(p, width, strides[2], strides[3], FLAT, UNIT)[None, :]


@triton.jit
def channel_block(program, channels, CHANNELS: tl.constexpr):
    """Return the sample of a program, its channels, and which of them exist."""
    blocks = tl.cdiv(channels, CHANNELS)
    c = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return (program // blocks).to(tl.int64), c, c < channels


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


def tiles_sharing(unit: int) -> int:
    """Return how many tiles a forward program takes, so that what a thread computes per channel serves several."""
    return TILES_SHARING if unit > 1 else 1


def part_programs(x: Tensor, channels: int, pixels: int) -> tuple[int, int]:
    """Return how many programs sum over the pixels of x, and how many of them share one block of channels."""
    programs, tiles = channel_blocks(x, channels), launching.cdiv(x.shape[2] * x.shape[3], pixels)
    splits = 1 if programs >= ENOUGH_PROGRAMS else max(1, launching.cdiv(tiles, TILES_PER_PART))
    return programs * splits, splits


def parts_of(total: Tensor, splits: int) -> Tensor:
    """Return where the parts of a total (B, C) go: (splits, B, C); in its own type where there is but one."""
    dtype = total.dtype if splits == 1 else torch.float32
    return torch.empty((splits, *total.shape), dtype=dtype, device=total.device)


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


def channel_blocks(x: Tensor, channels: int) -> int:
    """Return how many tiles of so many channels the samples of x have together."""
    return x.shape[0] * launching.cdiv(x.shape[1], channels)
