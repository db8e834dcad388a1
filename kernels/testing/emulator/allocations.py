"""Which bytes of tensors that `torch.empty` and its relatives made were never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

POISON = 0xFF  # NaN in every float type
ALLOCATORS = (
    (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
    (Tensor, ("new_empty", "new_empty_strided")),
)


@dataclass
class Allocation:
    """A storage that nothing has filled yet.

    Args:
        storage: held weakly.
        version: PyTorch's count of the operations that wrote to it, when its flags were last right.
        written: one flag per byte.
    """

    storage: StorageWeakRef
    version: int
    written: Tensor


class Allocations:
    """The storages that were allocated without values, and their written bytes.

    Kernels on the virtual GPU set the flags of what they store. Of what PyTorch itself writes only that it wrote is
    known, so that all of the storage counts as written from then on; what is written past PyTorch (through
    `Tensor.numpy`) is seen where it differs from the bytes that the storage was poisoned with.
    """

    def __init__(self) -> None:
        self._known: dict[int, Allocation] = {}

    def flags(self, tensor: Tensor) -> Tensor | None:
        """Return one flag per byte of a tensor's storage, None where all bytes were written."""
        key = tensor.untyped_storage()._cdata
        allocation = self._known.get(key)
        if allocation is None:
            return None
        if tensor._version != allocation.version:
            del self._known[key]
            return None
        allocation.written |= storage_bytes(tensor) != POISON
        return allocation.written

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Poison and remember what is allocated inside the block, by calls from Python."""
        originals = [(owner, name, getattr(owner, name)) for owner, names in ALLOCATORS for name in names]
        try:
            for owner, name, original in originals:
                setattr(owner, name, self._remembering(original))
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _remembering(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_remembered(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.is_inference():
                self._remember(tensor)
            return tensor

        return allocate_remembered

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or tensor.dtype is torch.bool:  # of which only two values are defined
            return
        storage_bytes(tensor).fill_(POISON)
        self._known = {key: value for key, value in self._known.items() if not value.storage.expired()}
        flags = torch.zeros(storage.nbytes(), dtype=torch.bool)
        self._known[storage._cdata] = Allocation(StorageWeakRef(storage), tensor._version, flags)


def storage_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's storage as a tensor that shares them."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def snapshot(tensor: Tensor) -> Tensor:
    """Return a copy of the bytes of a tensor's storage."""
    return storage_bytes(tensor).clone()
