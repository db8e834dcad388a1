"""Which bytes of tensors that `torch.empty` and its relatives made were never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from trifuse.kernels.torch_internals import replacing_functions

TILE = 1 << 16  # bytes of the pattern, which is repeated
CHUNK = 8  # bytes that count as written as soon as one of them is no longer what it was filled with
ALLOCATORS = (
    (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
    (Tensor, ("new_empty", "new_empty_strided")),
)

Allocator = Callable[..., Tensor]


@contextmanager
def allocators_wrapped(wrap: Callable[[Allocator], Allocator]) -> Iterator[None]:
    """Replace `torch.empty` and its relatives by what ``wrap`` makes of them, inside the block."""
    with torch.device("cpu"):
        torch.empty(0)  # now torch knows what `torch.device` as a context is for, and keeps it: not our functions
    originals = [(owner, name, getattr(owner, name)) for owner, names in ALLOCATORS for name in names]
    with replacing_functions():
        try:
            for owner, name, original in originals:
                setattr(owner, name, wrap(original))
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)


@dataclass
class Allocation:
    """A storage that nothing has filled yet.

    Args:
        storage: held weakly.
        version: PyTorch's count of the operations that wrote to it, when its flags were last right.
        written: one flag per byte.
        dtype: of the tensor that it was made for, by which it was filled.
    """

    storage: StorageWeakRef
    version: int
    written: Tensor
    dtype: torch.dtype


class Allocations:
    """The storages that were allocated without values, and their written bytes.

    Kernels on the virtual GPU set the flags of what they store. Of what PyTorch itself writes only that it wrote is
    known, so that all of the storage counts as written from then on; what is written past PyTorch (through
    `Tensor.numpy` or `Tensor.data`) is seen, by 8 bytes, where it differs from the drawn pattern that the storage was
    filled with.

    Args:
        seed: draws the pattern.
    """

    def __init__(self, seed: int = 0) -> None:
        self._known: dict[int, Allocation] = {}
        self._seed = seed

    def flags(self, tensor: Tensor) -> Tensor | None:
        """Return one flag per byte of a tensor's storage, None where all bytes were written."""
        key = tensor.untyped_storage()._cdata
        allocation = self._known.get(key)
        if allocation is None:
            return None
        bytes_now = storage_bytes(tensor)
        if tensor._version != allocation.version or len(bytes_now) != len(allocation.written):
            del self._known[key]
            return None
        past_torch = (bytes_now != filling(allocation.dtype, len(bytes_now), self._seed)) & ~allocation.written
        if past_torch.any():
            chunks = torch.nn.functional.pad(past_torch, (0, -len(past_torch) % CHUNK)).view(-1, CHUNK).any(dim=1)
            allocation.written |= chunks.repeat_interleave(CHUNK)[: len(past_torch)]
        return allocation.written

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Poison and remember what is allocated inside the block, by calls from Python."""
        with allocators_wrapped(self._remembering):
            yield

    def _remembering(self, allocate: Allocator) -> Allocator:
        def allocate_remembered(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.is_inference():
                self._remember(tensor)
            return tensor

        return allocate_remembered

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return
        storage_bytes(tensor).copy_(filling(tensor.dtype, storage.nbytes(), self._seed))
        self._known = {key: value for key, value in self._known.items() if not value.storage.expired()}
        flags = torch.zeros(storage.nbytes(), dtype=torch.bool)
        self._known[storage._cdata] = Allocation(StorageWeakRef(storage), tensor._version, flags, tensor.dtype)


def filling(dtype: torch.dtype, size: int, seed: int) -> Tensor:
    """Return the bytes that a storage of a type is filled with, in place of what it happens to hold.

    Seen as floats of any width they are NaN, seen as bools neither value; no constant looks like them.
    """
    tile = _tile("bool" if dtype is torch.bool else f"{dtype.itemsize > 1} {dtype.is_floating_point}", seed)
    return tile.repeat(-(-size // TILE))[:size]


@cache
def _tile(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed % (1 << 63))

    def drawn(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator).to(torch.uint8)

    if kind == "bool":
        return drawn(2, 256, TILE)
    if kind == "False True":  # 8 bits, of which few are NaN
        return drawn(0, 2, TILE) << 7 | 0x7F
    if kind == "False False":
        return drawn(0, 256, TILE)
    # Halves of 2 bytes, of which each is a NaN by itself, and the upper one makes a NaN of 4 or 8 bytes.
    return torch.stack([drawn(0xF1, 0xFF, TILE // 2), drawn(0, 2, TILE // 2) << 7 | 0x7F], dim=1).flatten()


def storage_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's storage as a tensor that shares them."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def snapshot(tensor: Tensor) -> Tensor:
    """Return a copy of the bytes of a tensor's storage."""
    return storage_bytes(tensor).clone()
