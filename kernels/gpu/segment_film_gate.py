"""Triton kernel of the segment FiLM gate, forward: one affine map per sample and channel, and one number per pixel.

    out = a * features + b + d * t,   t = the score of the pixel's segment, 0 outside the wall

Programs work on the tiles that all kernels of maps share (`maps`), but in planes on ``PLANE_PIXELS`` pixels at most,
so that a pixel's label is looked up once for several channels. What is looked up are a sample's few scores, which stay
in the nearest cache; labels are one byte per pixel. The ECG's map is never made, and nothing is copied. A label above
the number of segments reads no score: it counts as 0.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 C=256 H=32 W=32: 4.00 bytes per element, least 4.00; 7.8 us, floor 7.8 us
With 17 masks instead of labels, forward would read 17 bytes per pixel more at the least; with the ECG's map written
out, it would move twice as much.
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
    map_pointers,
    pixel_offsets,
    row_strides,
    strides_of,
    tile_of,
    tiles_sharing,
    unit_of,
)

PLANE_PIXELS = 256  # of a tile that lies along the pixels


@triton.jit
def row_values(values, strides, b, c, exists, UNIT: tl.constexpr = 1):
    """Load one value per channel of a tensor (B, C), in float32."""
    pointers = values + b * (strides[0] * UNIT) + c.to(tl.int64) * strides[1]
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def two_weights(weights, strides, b):
    """Load w_mri and w_ecg of a sample, in float32."""
    pointer = weights + b * strides[0]
    return tl.load(pointer).to(tl.float32), tl.load(pointer + strides[1]).to(tl.float32)


@triton.jit
def labels_and_scores(segments, strides, scores, scores_strides, count, b, p, on_map, width, FLAT: tl.constexpr):
    """Load the labels of pixels, those above ``count`` as 0, and the score of each, 0 for 0, in float32."""
    offsets = pixel_offsets(p, width, strides[1], strides[2], FLAT)
    label = tl.load(segments + b * strides[0] + offsets, mask=on_map, other=0).to(tl.int32)
    label = tl.where(label <= count, label, 0)
    pointers = scores + b * scores_strides[0] + (label - 1).to(tl.int64) * scores_strides[1]
    return label, tl.load(pointers, mask=label > 0, other=0.0).to(tl.float32)


@triton.jit
def _segment_film_fwd_kernel(
    features,
    segments,
    shared,
    scores,
    direction,
    weights,
    scale,
    shift,
    out,
    channel_units,
    width,
    pixels,
    count,  # segments
    features_strides,
    segments_strides,
    shared_strides,
    scores_strides,
    direction_strides,
    weights_strides,
    scale_strides,
    shift_strides,
    out_strides,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    blocks = tl.cdiv(pixels, PIXELS)
    b, c, channel_exists = channel_block(tl.program_id(0) // blocks, channels, CHANNELS)
    p = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)
    on_map = p < pixels
    exists = channel_exists[:, None] & on_map[None, :]
    source = map_pointers(features, features_strides, b, c, p, width, FLAT, UNIT)
    values = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    _, score = labels_and_scores(segments, segments_strides, scores, scores_strides, count, b, p, on_map, width, FLAT)
    w_mri, w_ecg = two_weights(weights, weights_strides, b)
    modulation = 1.0 + row_values(scale, scale_strides, b, c, channel_exists, UNIT)
    of_ecg = w_ecg * modulation
    added = of_ecg * row_values(shared, shared_strides, b, c, channel_exists, UNIT)
    added += row_values(shift, shift_strides, b, c, channel_exists, UNIT)
    along = of_ecg * row_values(direction, direction_strides, b, c, channel_exists, UNIT)
    values = values * (1.0 + w_mri * modulation)[:, None] + added[:, None] + along[:, None] * score[None, :]
    target = map_pointers(out, out_strides, b, c, p, width, FLAT, UNIT)
    tl.store(target, values.to(out.dtype.element_ty), mask=exists)


@tuning.tunable(TILE_CHOICES, lambda features, *others: map_key(features))
def forward(
    choice: tuning.Choice,
    features: Tensor,
    segments: Tensor,
    shared: Tensor,
    scores: Tensor,
    direction: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """Launch the forward kernel."""
    out = torch.empty_like(features)
    if out.numel() == 0:
        return out
    positions, unit = features.shape[2] * features.shape[3], unit_of(features, out, rows=(shared, scale, shift))
    channels, pixels = tile_of(features, choice["tiles"] * tiles_sharing(unit), PLANE_PIXELS)
    programs = features.shape[0] * launching.cdiv(features.shape[1], channels) * launching.cdiv(positions, pixels)
    with torch.cuda.device_of(features):
        launching.launch(
            _segment_film_fwd_kernel,
            (programs,),
            features,
            segments,
            shared,
            scores,
            direction,
            weights,
            scale,
            shift,
            out,
            features.shape[1] // unit,
            features.shape[3],
            positions,
            scores.shape[1],
            strides_of(features, unit),
            label_strides(segments),
            row_strides(shared, unit),
            scores.stride(),
            (0, *direction.stride()),
            weights.stride(),
            row_strides(scale, unit),
            row_strides(shift, unit),
            strides_of(out, unit),
            CHANNELS=channels,
            PIXELS=pixels,
            FLAT=is_flat(features, out) and labels_are_flat(segments),
            UNIT=unit,
            num_warps=THREADS // WARP_SIZE,
        )
    return out


def label_strides(segments: Tensor) -> tuple[int, int, int]:
    """Return the strides of labels (B, H, W); in a map of one column, pixels lie a row apart."""
    b, h, w = segments.stride()
    return b, h, h if segments.shape[2] == 1 else w


def labels_are_flat(segments: Tensor) -> bool:
    """Tell whether the labels of a sample lie one distance apart, row after row."""
    return segments.shape[1] == 1 or segments.stride(1) == segments.shape[2] * label_strides(segments)[2]
