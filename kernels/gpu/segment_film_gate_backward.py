"""Triton kernels of the segment FiLM gate, backward: two launches, and a third for what all samples share.

The gradients of all small arguments follow from three sums per sample and channel, over the pixels: of the gradient g,
of g times the map, and of g times the score of the pixel's segment; and from one sum per sample and segment, over the
channels and the pixels of that segment: of g times d, the channel's share in a score.

The first launch reads the gradient and the map once, writes the map's gradient, and adds up all four. Which way it
walks depends on the layout. In planes a program stays with its pixels and walks over channels: labels are looked up
once, and what goes to the segments is kept per pixel and sorted once, at the end. In channels-last maps it stays with
its channels and walks over pixels, as the temporal gate does; then what is kept per channel is added up once.

The second launch, a program per sample, adds up the parts in their order and writes the gradients; it computes in
float64, for each part is a long sum, and there are few. The third adds up the direction's gradients over the samples.
No atomics: results repeat bit for bit. Where no gradient but the map's is asked for, the temporal gate's kernel makes
it: neither the ECG nor its segments play a part in it.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* backward, B=32 C=256 H=32 W=32: 6.00 bytes per element, least 6.00; 11.7 us, floor 11.7 us
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, maps, temporal_film_gate, tuning
from .gates import add_parts
from .maps import ENOUGH_PROGRAMS, THREADS, WARP_SIZE, channel_block, map_pointers
from .segment_film_gate import label_strides, labels_and_scores, labels_are_flat, row_values, two_weights

BACKWARD_CHOICES = ({"pixels": 256}, {"pixels": 128})  # most of a tile that lies along the pixels
TILES_PER_WALK = 8  # along the channels of planes, where there are fewer programs than fill a GPU
SEGMENTS_AT_ONCE = 8  # that the pixels of planes are sorted into
MOST_SORTED = 2048  # segments times pixels of a tile that lies along the channels
CHANNELS_AT_ONCE, PARTS_AT_ONCE = 64, 16  # of a sample, in the launch that follows the sums


@triton.jit(do_not_specialize=["splits"])
def _segment_film_planes_bwd_kernel(
    grad,
    features,
    segments,
    scores,
    direction,
    weights,
    scale,
    features_grad,  # or None
    sums,  # (blocks of pixels, 3, B * C): of grad, of grad * features, of grad * score
    segment_sums,  # (blocks of pixels * splits, B, segments)
    channel_units,
    width,
    pixels,
    rows,  # B * C
    count,  # segments
    segment_rows,  # B * segments
    grad_strides,
    features_strides,
    segments_strides,
    scores_strides,
    direction_strides,
    weights_strides,
    scale_strides,
    features_grad_strides,
    splits,  # programs that share the channels
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    split = tl.program_id(0) % splits
    blocks = tl.cdiv(pixels, PIXELS)
    block = (tl.program_id(0) // splits) % blocks
    b = (tl.program_id(0) // splits // blocks).to(tl.int64)
    p = block * PIXELS + tl.arange(0, PIXELS)
    on_map = p < pixels
    label, score = labels_and_scores(
        segments, segments_strides, scores, scores_strides, count, b, p, on_map, width, FLAT
    )
    w_mri, w_ecg = two_weights(weights, weights_strides, b)
    of_pixels = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for start in range(split * CHANNELS, channels, splits * CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        channel_exists = c < channels
        exists = channel_exists[:, None] & on_map[None, :]
        modulation = 1.0 + row_values(scale, scale_strides, b, c, channel_exists, UNIT)
        along = w_ecg * modulation * row_values(direction, direction_strides, b, c, channel_exists, UNIT)
        source = map_pointers(grad, grad_strides, b, c, p, width, FLAT, UNIT)
        incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        of_pixels += incoming * along[:, None]
        if features_grad is not None:
            outgoing = map_pointers(features_grad, features_grad_strides, b, c, p, width, FLAT, UNIT)
            values = incoming * (1.0 + w_mri * modulation)[:, None]
            tl.store(outgoing, values.to(features_grad.dtype.element_ty), mask=exists)
        source = map_pointers(features, features_strides, b, c, p, width, FLAT, UNIT)
        values = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        target = sums + block.to(tl.int64) * 3 * rows + b * channels + c
        tl.store(target, tl.sum(incoming, axis=1), mask=channel_exists)
        tl.store(target + rows, tl.sum(incoming * values, axis=1), mask=channel_exists)
        tl.store(target + 2 * rows, tl.sum(incoming * score[None, :], axis=1), mask=channel_exists)
    of_pixel = tl.sum(of_pixels, axis=0)
    target = segment_sums + (block * splits + split).to(tl.int64) * segment_rows + b * count
    for start in range(1, count + 1, SEGMENTS):
        s = start + tl.arange(0, SEGMENTS)
        sorted_sums = tl.sum(tl.where(label[None, :] == s[:, None], of_pixel[None, :], 0.0), axis=1)
        tl.store(target + s - 1, sorted_sums, mask=s <= count)


@triton.jit(do_not_specialize=["splits"])
def _segment_film_columns_bwd_kernel(
    grad,
    features,
    segments,
    scores,
    direction,
    weights,
    scale,
    features_grad,  # or None
    sums,  # (splits, 3, B * C): of grad, of grad * features, of grad * score
    segment_sums,  # (blocks of channels * splits, B, segments)
    channel_units,
    width,
    pixels,
    rows,  # B * C
    count,  # segments
    segment_rows,  # B * segments
    grad_strides,
    features_strides,
    segments_strides,
    scores_strides,
    direction_strides,
    weights_strides,
    scale_strides,
    features_grad_strides,
    splits,  # programs that share the pixels
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    channels = channel_units * UNIT
    split = tl.program_id(0) % splits
    block = (tl.program_id(0) // splits) % tl.cdiv(channels, CHANNELS)
    b, c, channel_exists = channel_block(tl.program_id(0) // splits, channels, CHANNELS)
    w_mri, w_ecg = two_weights(weights, weights_strides, b)
    modulation = 1.0 + row_values(scale, scale_strides, b, c, channel_exists, UNIT)
    along = w_ecg * modulation * row_values(direction, direction_strides, b, c, channel_exists, UNIT)
    grad_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    product_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    score_sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    s = 1 + tl.arange(0, SEGMENTS)
    sorted_sums = tl.zeros((SEGMENTS, PIXELS), dtype=tl.float32)
    for start in range(split * PIXELS, pixels, splits * PIXELS):
        p = start + tl.arange(0, PIXELS)
        on_map = p < pixels
        exists = channel_exists[:, None] & on_map[None, :]
        label, score = labels_and_scores(
            segments, segments_strides, scores, scores_strides, count, b, p, on_map, width, FLAT
        )
        source = map_pointers(grad, grad_strides, b, c, p, width, FLAT, UNIT)
        incoming = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        source = map_pointers(features, features_strides, b, c, p, width, FLAT, UNIT)
        grad_sums += incoming
        product_sums += incoming * tl.load(source, mask=exists, other=0.0).to(tl.float32)
        score_sums += incoming * score[None, :]
        of_pixel = tl.sum(incoming * along[:, None], axis=0)
        sorted_sums += tl.where(label[None, :] == s[:, None], of_pixel[None, :], 0.0)
        if features_grad is not None:
            outgoing = map_pointers(features_grad, features_grad_strides, b, c, p, width, FLAT, UNIT)
            values = incoming * (1.0 + w_mri * modulation)[:, None]
            tl.store(outgoing, values.to(features_grad.dtype.element_ty), mask=exists)
    target = sums + split.to(tl.int64) * 3 * rows + b * channels + c
    tl.store(target, tl.sum(grad_sums, axis=1), mask=channel_exists)
    tl.store(target + rows, tl.sum(product_sums, axis=1), mask=channel_exists)
    tl.store(target + 2 * rows, tl.sum(score_sums, axis=1), mask=channel_exists)
    target = segment_sums + (block * splits + split).to(tl.int64) * segment_rows + b * count
    tl.store(target + s - 1, tl.sum(sorted_sums, axis=1), mask=s <= count)


@triton.jit
def _total(first, stride, parts, exists, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Add up parts, ``stride`` apart, in a fixed order, in float64: there are few of them, and each is a long sum."""
    total = tl.zeros((PARTS, CHANNELS), dtype=tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        pointers = first[None, :] + part.to(tl.int64)[:, None] * stride
        total += tl.load(pointers, mask=exists[None, :] & (part < parts)[:, None], other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _store(pointers, values, exists):
    """Store float64 values in the pointers' type, by way of float32: not everything rounds them to bfloat16."""
    tl.store(pointers, values.to(tl.float32).to(pointers.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["parts", "segment_parts"])
def _segment_film_small_bwd_kernel(
    sums,  # (parts, 3, B * C)
    segment_sums,  # (segment_parts, B, segments)
    shared,
    direction,
    weights,
    scale,
    shared_grad,  # this and the following contiguous
    scores_grad,
    direction_grad,  # (B, C): each sample's share
    weights_grad,
    scale_grad,
    shift_grad,
    channels,
    rows,  # B * C
    count,  # segments
    segment_rows,  # B * segments
    shared_strides,
    direction_strides,
    weights_strides,
    scale_strides,
    parts,
    segment_parts,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    w_mri, w_ecg = two_weights(weights, weights_strides, b)
    mri_sums = tl.zeros((CHANNELS,), dtype=tl.float64)
    ecg_sums = tl.zeros((CHANNELS,), dtype=tl.float64)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        exists = c < channels
        row = b * channels + c
        grad_sum = _total(sums + row, 3 * rows, parts, exists, PARTS, CHANNELS)
        product_sum = _total(sums + rows + row, 3 * rows, parts, exists, PARTS, CHANNELS)
        score_sum = _total(sums + 2 * rows + row, 3 * rows, parts, exists, PARTS, CHANNELS)
        modulation = 1.0 + row_values(scale, scale_strides, b, c, exists).to(tl.float64)
        of_ecg = w_ecg * modulation
        ecg_sum = row_values(shared, shared_strides, b, c, exists) * grad_sum
        ecg_sum += row_values(direction, direction_strides, b, c, exists) * score_sum
        mri_sums += modulation * product_sum
        ecg_sums += modulation * ecg_sum
        mixed_sum = w_mri * product_sum + w_ecg * ecg_sum
        _store(shared_grad + row, of_ecg * grad_sum, exists)
        _store(direction_grad + row, of_ecg * score_sum, exists)
        _store(scale_grad + row, mixed_sum, exists)
        _store(shift_grad + row, grad_sum, exists)
    _store(weights_grad + 2 * b, tl.sum(mri_sums, axis=0), None)
    _store(weights_grad + 2 * b + 1, tl.sum(ecg_sums, axis=0), None)
    for start in range(0, count, CHANNELS):
        s = start + tl.arange(0, CHANNELS)
        exists = s < count
        segment_sum = _total(segment_sums + b * count + s, segment_rows, segment_parts, exists, PARTS, CHANNELS)
        _store(scores_grad + b * count + s, segment_sum, exists)


def backward(
    grad: Tensor,
    features: Tensor | None,
    segments: Tensor,
    shared: Tensor,
    scores: Tensor,
    direction: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
    needs_features: bool,
) -> list[Tensor]:
    """Launch the backward kernels.

    Returns:
        With features, the gradients of shared, scores, direction, weights, scale and shift; then that of the features,
        if it is needed.
    """
    if features is None:
        return temporal_film_gate.backward(grad, None, shared, weights, scale, shift, needs_features)
    map_grads = [torch.empty_like(features)] if needs_features else []
    if grad.numel() == 0:
        small = (shared, scores, direction, weights, scale, shift)
        return [*(value.new_zeros(value.shape) for value in small), *map_grads]
    map_grad = map_grads[0] if needs_features else None
    with torch.cuda.device_of(grad):
        sums = map_pass(grad, features, segments, scores, direction, weights, scale, map_grad)
        return [*_small_gradients(*sums, shared, scores, direction, weights, scale, shift), *map_grads]


@tuning.tunable(
    BACKWARD_CHOICES,
    lambda grad, features, *others: maps.map_key(features, others[-1] is not None),
    lambda choice, grad, features, *others: not _in_columns(features) or choice == BACKWARD_CHOICES[0],
)
def map_pass(
    choice: tuning.Choice,
    grad: Tensor,
    features: Tensor,
    segments: Tensor,
    scores: Tensor,
    direction: Tensor,
    weights: Tensor,
    scale: Tensor,
    map_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Write the map's gradient; return the parts of the sums per channel and of those per segment."""
    batch, channels, height, width = features.shape
    tensors = (grad, features, features if map_grad is None else map_grad)
    unit = maps.unit_of(*tensors, rows=(scale,))
    tile_channels, tile_pixels = maps.tile_of(features, 1, choice["pixels"])
    blocks = launching.cdiv(height * width, tile_pixels)
    if _in_columns(features):
        kernel, at_once = _segment_film_columns_bwd_kernel, launching.next_power_of_2(max(1, scores.shape[1]))
        tile_pixels = min(tile_pixels, max(1, MOST_SORTED // at_once))
        programs, splits = maps.part_programs(features, tile_channels, tile_pixels)
        parts = splits
    else:
        kernel, at_once = _segment_film_planes_bwd_kernel, SEGMENTS_AT_ONCE
        walks = launching.cdiv(launching.cdiv(channels, tile_channels), TILES_PER_WALK)
        splits = 1 if batch * blocks >= ENOUGH_PROGRAMS else walks
        programs, parts = batch * blocks * splits, blocks
    sums = torch.empty((parts, 3, batch, channels), dtype=torch.float32, device=grad.device)
    segment_sums = sums.new_empty((programs // batch, *scores.shape))
    launching.launch(
        kernel,
        (programs,),
        grad,
        features,
        segments,
        scores,
        direction,
        weights,
        scale,
        map_grad,
        sums,
        segment_sums,
        channels // unit,
        width,
        height * width,
        batch * channels,
        scores.shape[1],
        scores.numel(),
        maps.strides_of(grad, unit),
        maps.strides_of(features, unit),
        label_strides(segments),
        scores.stride(),
        (0, *direction.stride()),
        weights.stride(),
        maps.row_strides(scale, unit),
        maps.strides_of(tensors[-1], unit),
        splits,
        CHANNELS=tile_channels,
        PIXELS=tile_pixels,
        SEGMENTS=at_once,
        FLAT=maps.is_flat(*tensors) and labels_are_flat(segments),
        UNIT=unit,
        num_warps=THREADS // WARP_SIZE,
    )
    return sums, segment_sums


def _in_columns(x: Tensor) -> bool:
    """Tell whether a tile of x (B, C, H, W) lies along the channels, as `tile_of` has it."""
    return x.stride(1) == 1 and x.stride(3) != 1


def _small_gradients(sums: Tensor, segment_sums: Tensor, *small: Tensor) -> list[Tensor]:
    shared, scores, direction, weights, scale, shift = small
    grads = [value.new_empty(value.shape) for value in (shared, scores, weights, scale, shift)]
    shares = maps.parts_of(direction, len(shared))  # (B, C)
    launching.launch(
        _segment_film_small_bwd_kernel,
        (len(shared),),
        sums,
        segment_sums,
        shared,
        direction,
        weights,
        scale,
        *grads[:2],
        shares,
        *grads[2:],
        shared.shape[1],
        shared.numel(),
        scores.shape[1],
        scores.numel(),
        shared.stride(),
        (0, *direction.stride()),
        weights.stride(),
        scale.stride(),
        len(sums),
        len(segment_sums),
        CHANNELS=CHANNELS_AT_ONCE,
        PARTS=PARTS_AT_ONCE,
        num_warps=THREADS // WARP_SIZE,
    )
    return [*grads[:2], add_parts(shares, direction.dtype), *grads[2:]]
