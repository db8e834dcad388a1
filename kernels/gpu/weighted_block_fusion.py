"""Triton kernels of weighted block fusion.

The N maps come as a tuple of pointers: the loop over them is unrolled, so that many loads of a tile are in flight at
once, each thread moving 16 bytes per load. A tile is TILE consecutive elements of one sample, which lets the maps be
views that leave out leading tokens (the class token) without a copy. The softmax of the logits is recomputed by
every program: N scalars against N * TILE elements.

Forward reads N maps and writes one; and each selected map once more while its tile is in registers. The selection is
read on the GPU: of the k stores that every map has, those run whose place in the selection names the map.

Backward reads the gradient and the N maps once, and writes the maps' gradients that are asked for; more than
MAPS_PER_LAUNCH maps take several launches, each reading the gradient again, so that the sums stay in registers. Each of
at most MAX_PROGRAMS programs adds up its tiles in a fixed order and writes one partial sum per map; a last, single
program adds these up in a fixed order. No atomics: results repeat bit for bit.

Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing was measured on a GPU:
* forward, B=32 M=1025 D=768 N=12: 26.00 bytes per element, least 26.00; 152.3 us, floor 152.3 us
* forward, B=32 M=1025 D=1536 N=40: 82.00 bytes per element, least 82.00; 960.8 us, floor 960.8 us
* forward, selecting, B=32 M=1025 D=768 N=12 K=4: 34.00 bytes per element, least 34.00; 199.2 us, floor 199.2 us
* forward, selecting, B=32 M=1025 D=1536 N=40 K=4: 90.00 bytes per element, least 90.00; 1054.5 us, floor 1054.5 us
* backward, frozen maps, B=32 M=1025 D=768 N=12: 26.00 bytes per element, least 26.00; 152.3 us, floor 152.3 us
* backward, frozen maps, B=32 M=1025 D=1536 N=40: 84.00 bytes per element, least 82.00; 984.2 us, floor 960.8 us
* backward, trained maps, B=32 M=1025 D=768 N=12: 50.00 bytes per element, least 50.00; 292.9 us, floor 292.9 us
The gradient is read once per launch: of 40 maps, twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning

FORWARD_CHOICES = ({"threads": 128}, {"threads": 256})
BACKWARD_CHOICES = ({"threads": 128}, {"threads": 256})
THREADS = FORWARD_CHOICES[0]["threads"]
WARP_SIZE = 64 if torch.version.hip else 32
BYTES_PER_THREAD = 16
MAPS_IN_FLIGHT = 32  # of the forward pass: a barrier keeps the compiler from loading more before the first is used
MAPS_PER_GROUP = 8  # of the forward pass, where selected maps are written
MAPS_PER_LAUNCH = 24  # of the backward pass
MAX_PROGRAMS = 1024  # of the backward pass; fixed, so that the order of summation does not depend on the device
REDUCE_ELEMENTS = 8192  # partial sums that the reducing program holds at once
REDUCE_THREADS = 256


@triton.jit
def _softmax_parts(logits, N: tl.constexpr):
    """Return the maximum of the logits and the sum of the exponentials of their distances to it."""
    largest = tl.load(logits).to(tl.float32)
    for i in tl.static_range(1, N):
        largest = tl.maximum(largest, tl.load(logits + i).to(tl.float32))
    total = 0.0
    for i in tl.static_range(N):
        total += tl.exp(tl.load(logits + i).to(tl.float32) - largest)
    return largest, total


@triton.jit
def _softmax_weight(logits, i, largest, total):
    """Return the weight of map i."""
    return tl.exp(tl.load(logits + i).to(tl.float32) - largest) / total


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
    selection,  # (K,), which maps are written once more; None where there are none
    selected,  # K pointers to (B, row_elements), contiguous; or None
    row_elements,
    map_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
):
    largest, total = _softmax_parts(logits, N)
    row, offsets, exists = _tile_offsets(tl.program_id(0), row_elements, TILE)
    chosen = ()
    for k in tl.static_range(K):
        index = tl.load(selection + k)
        chosen = chosen + (tl.where((index >= 0) & (index < N), index, -1).to(tl.int32),)
    accumulated = tl.zeros((TILE,), dtype=tl.float32)
    for first in tl.static_range(0, N, GROUP):
        # No load moves above a store, which might be to the same place: those of a group come first.
        values = ()
        weights = ()
        for i in tl.static_range(first, first + GROUP):
            if i < N:
                values = values + (tl.load(maps[i] + row * map_stride + offsets, mask=exists, other=0.0),)
                weights = weights + (_softmax_weight(logits, i, largest, total),)
        for i in tl.static_range(first, first + GROUP):
            if i < N:
                accumulated += weights[i - first] * values[i - first].to(tl.float32)
                for k in tl.static_range(K):
                    place = selected[k] + row * row_elements + offsets
                    tl.store(place, values[i - first], mask=exists & (chosen[k] == i))
                if i % IN_FLIGHT == IN_FLIGHT - 1:
                    tl.debug_barrier()
    tl.store(fused + row * row_elements + offsets, accumulated.to(fused.dtype.element_ty), mask=exists)
    for k in tl.static_range(K):
        place = selected[k] + row * row_elements + offsets
        nothing = tl.full((TILE,), float("nan"), dtype=tl.float32)
        tl.store(place, nothing.to(fused.dtype.element_ty), mask=exists & (chosen[k] < 0))


@triton.jit
def _weighted_block_fusion_bwd_kernel(
    grad,  # (B, row_elements), contiguous
    maps,  # COUNT pointers to (B, row_elements), samples map_stride apart: the maps from `first` on
    map_grads,  # COUNT pointers to (B, row_elements), contiguous, or None where no gradient is asked for
    logits,  # (N,)
    partial_sums,  # (programs, N) float32: each program's share of sum(grad * map)
    row_elements,
    map_stride,
    tiles,
    first,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,  # consecutive elements that one thread holds
):
    largest, total = _softmax_parts(logits, N)
    # One running sum per map and thread; threads are added up only once, after the last tile.
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((TILE // VECTOR,), dtype=tl.float32),)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, offsets, exists = _tile_offsets(tile, row_elements, TILE)
        incoming = tl.load(grad + row * row_elements + offsets, mask=exists, other=0.0).to(tl.float32)
        updated = ()
        for i in tl.static_range(COUNT):
            values = tl.load(maps[i] + row * map_stride + offsets, mask=exists, other=0.0).to(tl.float32)
            products = tl.reshape(incoming * values, (TILE // VECTOR, VECTOR))
            updated = updated + (sums[i] + tl.sum(products, axis=1),)
            if map_grads[i] is not None:
                outgoing = _softmax_weight(logits, first + i, largest, total) * incoming
                pointer = map_grads[i] + row * row_elements + offsets
                tl.store(pointer, outgoing.to(map_grads[i].dtype.element_ty), mask=exists)
        sums = updated
    for i in tl.static_range(COUNT):
        tl.store(partial_sums + tl.program_id(0) * N + first + i, tl.sum(sums[i], axis=0))


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


@tuning.tunable(FORWARD_CHOICES, lambda maps, _, chosen=None: tuning.key_of(maps[0], len(maps), _count(chosen)))
def forward(
    choice: tuning.Choice, features: Sequence[Tensor], logits: Tensor, selection: Tensor | None = None
) -> list[Tensor]:
    """Launch the forward kernel on maps of shape (B, M, D); return the fused map, and the maps of a selection (K,)."""
    maps, map_stride = _rows(features)
    fused = torch.empty(maps[0].shape, dtype=maps[0].dtype, device=maps[0].device)
    count = _count(selection)
    selected = [torch.empty_like(fused) for _ in range(count)]
    if fused.numel() == 0:
        return [fused, *selected]
    tile = choice["threads"] * _vector(fused)
    row_elements = fused.shape[1] * fused.shape[2]
    with torch.cuda.device_of(fused):
        launching.launch(
            _weighted_block_fusion_fwd_kernel,
            (fused.shape[0] * launching.cdiv(row_elements, tile),),
            maps,
            logits.contiguous(),
            fused,
            None if selection is None else selection.contiguous(),
            tuple(selected) or None,
            row_elements,
            map_stride,
            N=len(maps),
            K=count,
            TILE=tile,
            GROUP=MAPS_PER_GROUP if count else 1,
            IN_FLIGHT=MAPS_IN_FLIGHT,
            num_warps=choice["threads"] // WARP_SIZE,
        )
    return [fused, *selected]


@tuning.tunable(BACKWARD_CHOICES, lambda grad, maps, _, needed: tuning.key_of(grad, len(maps), any(needed)))
def backward(
    choice: tuning.Choice, grad: Tensor, features: Sequence[Tensor], logits: Tensor, needs_features: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """Launch the backward kernels; return the logits' gradient and those of the maps that need one."""
    grad, logits = grad.contiguous(), logits.contiguous()
    maps, map_stride = _rows(features)
    map_grads = [torch.empty_like(grad) if needed else None for needed in needs_features]
    needed_grads = [map_grad for map_grad in map_grads if map_grad is not None]
    if grad.numel() == 0:
        return torch.zeros_like(logits), needed_grads
    vector = _vector(grad)
    tile = choice["threads"] * vector
    row_elements = grad.shape[1] * grad.shape[2]
    tiles = grad.shape[0] * launching.cdiv(row_elements, tile)
    programs = min(tiles, MAX_PROGRAMS)
    partial_sums = torch.empty((programs, len(maps)), dtype=torch.float32, device=grad.device)
    logits_grad = torch.empty_like(logits)
    padded = launching.next_power_of_2(len(maps))
    with torch.cuda.device_of(grad):
        for first, end in launch_groups(len(maps)):
            launching.launch(
                _weighted_block_fusion_bwd_kernel,
                (programs,),
                grad,
                maps[first:end],
                tuple(map_grads[first:end]),
                logits,
                partial_sums,
                row_elements,
                map_stride,
                tiles,
                first,
                N=len(maps),
                COUNT=end - first,
                TILE=tile,
                VECTOR=vector,
                num_warps=choice["threads"] // WARP_SIZE,
            )
        launching.launch(
            _weighted_block_fusion_logits_kernel,
            (1,),
            partial_sums,
            logits,
            logits_grad,
            programs,
            N=len(maps),
            N_PADDED=padded,
            ROWS=max(1, REDUCE_ELEMENTS // padded),
            num_warps=REDUCE_THREADS // WARP_SIZE,
        )
    return logits_grad, needed_grads


def launch_groups(n: int) -> list[tuple[int, int]]:
    """Cut n maps into the fewest groups of at most MAPS_PER_LAUNCH, as even as possible, as (first, end) pairs."""
    groups = launching.cdiv(n, MAPS_PER_LAUNCH)
    edges = [n * k // groups for k in range(groups + 1)]
    return list(pairwise(edges))


def _count(selection: Tensor | None) -> int:
    return 0 if selection is None else len(selection)


def _vector(tensor: Tensor) -> int:
    return BYTES_PER_THREAD // tensor.element_size()


def _rows(features: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int]:
    """Return the maps with contiguous samples that lie one common stride apart; copy only where they do not."""
    strides = features[0].stride()
    if any(f.stride() != strides for f in features) or not features[0][:1].is_contiguous():
        features = [f.contiguous() for f in features]
    return tuple(features), features[0].stride(0)
