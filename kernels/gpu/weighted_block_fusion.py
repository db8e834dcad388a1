"""Triton kernels of weighted block fusion.

The N maps come as a tuple of pointers: the loop over them is unrolled, so that all N loads of a tile are in flight at
once, each thread moving 16 bytes per load. A tile is TILE consecutive elements of one sample, which lets the maps be
views that leave out leading tokens (the class token) without a copy. The softmax of the logits is recomputed by
every program: N scalars against N * TILE elements.

Forward reads N maps, writes one. Backward reads the gradient and, for the logits, the N maps, and writes the maps'
gradients that are asked for; each of at most MAX_PROGRAMS programs adds up its tiles in a fixed order and writes N
partial sums, which a second, single program adds up in a fixed order. No atomics: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
BYTES_PER_THREAD = 16
MAX_PROGRAMS = 1024  # of the backward pass; fixed, so that the order of summation does not depend on the device
REDUCE_ELEMENTS = 8192  # partial sums that the reducing program holds at once


@triton.jit
def _shifted_exponentials(logits, N: tl.constexpr):
    """Return the N exponentials of the logits minus their maximum, and their sum."""
    largest = tl.load(logits).to(tl.float32)
    for i in tl.static_range(1, N):
        largest = tl.maximum(largest, tl.load(logits + i).to(tl.float32))
    exponentials = ()
    total = 0.0
    for i in tl.static_range(N):
        exponential = tl.exp(tl.load(logits + i).to(tl.float32) - largest)
        exponentials = exponentials + (exponential,)
        total += exponential
    return exponentials, total


@triton.jit
def _tile_offsets(tile, row_elements, TILE: tl.constexpr):
    """Return the sample of a tile, the offsets of its elements inside the sample, and which of them exist."""
    tiles_per_row = tl.cdiv(row_elements, TILE)
    row = (tile // tiles_per_row).to(tl.int64)
    offsets = (tile % tiles_per_row).to(tl.int64) * TILE + tl.arange(0, TILE)
    return row, offsets, offsets < row_elements


@triton.jit
def _weighted_block_fusion_fwd_kernel(
    maps,  # N pointers to (B, row_elements), samples map_stride apart
    logits,  # (N,)
    fused,  # (B, row_elements), contiguous
    row_elements,
    map_stride,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    row, offsets, exists = _tile_offsets(tl.program_id(0), row_elements, TILE)
    exponentials, total = _shifted_exponentials(logits, N)
    accumulated = tl.zeros((TILE,), dtype=tl.float32)
    for i in tl.static_range(N):
        values = tl.load(maps[i] + row * map_stride + offsets, mask=exists, other=0.0)
        accumulated += (exponentials[i] / total) * values.to(tl.float32)
    tl.store(fused + row * row_elements + offsets, accumulated.to(fused.dtype.element_ty), mask=exists)


@triton.jit
def _weighted_block_fusion_bwd_kernel(
    grad,  # (B, row_elements), contiguous
    maps,  # N pointers to (B, row_elements), samples map_stride apart
    logits,  # (N,)
    map_grads,  # N pointers to (B, row_elements), contiguous, or None where no gradient is asked for
    partial_sums,  # (programs, N) float32: each program's share of sum(grad * map)
    row_elements,
    map_stride,
    tiles,
    N: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,  # consecutive elements that one thread holds
    NEEDS_LOGITS: tl.constexpr,
):
    exponentials, total = _shifted_exponentials(logits, N)
    # One running sum per map and thread; threads are added up only once, after the last tile.
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros((TILE // VECTOR,), dtype=tl.float32),)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, offsets, exists = _tile_offsets(tile, row_elements, TILE)
        incoming = tl.load(grad + row * row_elements + offsets, mask=exists, other=0.0).to(tl.float32)
        updated = ()
        for i in tl.static_range(N):
            if map_grads[i] is not None:
                outgoing = (exponentials[i] / total) * incoming
                pointer = map_grads[i] + row * row_elements + offsets
                tl.store(pointer, outgoing.to(map_grads[i].dtype.element_ty), mask=exists)
            if NEEDS_LOGITS:
                values = tl.load(maps[i] + row * map_stride + offsets, mask=exists, other=0.0).to(tl.float32)
                products = tl.reshape(incoming * values, (TILE // VECTOR, VECTOR))
                updated = updated + (sums[i] + tl.sum(products, axis=1),)
            else:
                updated = updated + (sums[i],)
        sums = updated
    if NEEDS_LOGITS:
        for i in tl.static_range(N):
            tl.store(partial_sums + tl.program_id(0) * N + i, tl.sum(sums[i], axis=0))


@triton.jit
def _weighted_block_fusion_logits_kernel(
    partial_sums,  # (programs, N) float32
    logits,  # (N,)
    logits_grad,  # (N,)
    programs,
    N: tl.constexpr,
    N_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = tl.arange(0, N_PADDED)
    real = blocks < N
    sums = tl.zeros((N_PADDED,), dtype=tl.float32)
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < programs)[:, None] & real[None, :]
        sums += tl.sum(tl.load(partial_sums + rows[:, None] * N + blocks[None, :], mask=mask, other=0.0), axis=0)
    scores = tl.load(logits + blocks, mask=real, other=-float("inf")).to(tl.float32)
    exponentials = tl.exp(scores - tl.max(scores, axis=0))
    weights = exponentials / tl.sum(exponentials, axis=0)
    result = weights * (sums - tl.sum(weights * sums, axis=0))
    tl.store(logits_grad + blocks, result.to(logits_grad.dtype.element_ty), mask=real)


def forward(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Launch the forward kernel on maps of shape (B, M, D)."""
    maps, map_stride = _rows(features)
    fused = torch.empty(maps[0].shape, dtype=maps[0].dtype, device=maps[0].device)
    if fused.numel() == 0:
        return fused
    tile = _tile(maps[0])
    row_elements = fused[0].numel()
    grid = (fused.shape[0] * triton.cdiv(row_elements, tile),)
    _weighted_block_fusion_fwd_kernel[grid](
        maps, logits.contiguous(), fused, row_elements, map_stride, N=len(maps), TILE=tile, num_warps=NUM_WARPS
    )
    return fused


def backward(
    grad: Tensor, features: Sequence[Tensor], logits: Tensor, needs_features: Sequence[bool], needs_logits: bool
) -> tuple[list[Tensor], Tensor]:
    """Launch the backward kernels; return the maps' gradients that are needed and the logits' gradient.

    The logits' gradient is left unwritten where it is not needed.
    """
    grad, logits = grad.contiguous(), logits.contiguous()
    maps, map_stride = _rows(features)
    map_grads = [torch.empty_like(grad) if needed else None for needed in needs_features]
    computed = [g for g in map_grads if g is not None]
    if grad.numel() == 0:
        return computed, torch.zeros_like(logits)
    tile = _tile(grad)
    row_elements = grad[0].numel()
    tiles = grad.shape[0] * triton.cdiv(row_elements, tile)
    programs = min(tiles, MAX_PROGRAMS)
    partial_sums = torch.empty((programs, len(maps)), dtype=torch.float32, device=grad.device)
    _weighted_block_fusion_bwd_kernel[(programs,)](
        grad,
        maps,
        logits,
        tuple(map_grads),
        partial_sums,
        row_elements,
        map_stride,
        tiles,
        N=len(maps),
        TILE=tile,
        VECTOR=BYTES_PER_THREAD // grad.element_size(),
        NEEDS_LOGITS=needs_logits,
        num_warps=NUM_WARPS,
    )
    logits_grad = torch.empty_like(logits)
    if needs_logits:
        padded = triton.next_power_of_2(len(maps))
        _weighted_block_fusion_logits_kernel[(1,)](
            partial_sums,
            logits,
            logits_grad,
            programs,
            N=len(maps),
            N_PADDED=padded,
            ROWS=max(1, REDUCE_ELEMENTS // padded),
            num_warps=2 * NUM_WARPS,
        )
    return computed, logits_grad


def _tile(tensor: Tensor) -> int:
    return NUM_WARPS * 32 * (BYTES_PER_THREAD // tensor.element_size())


def _rows(features: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int]:
    """Return the maps with contiguous samples that lie one common stride apart; copy only where they do not."""
    strides = features[0].stride()
    if any(f.stride() != strides for f in features) or not features[0][:1].is_contiguous():
        features = [f.contiguous() for f in features]
    return tuple(features), features[0].stride(0)
