"""Memory that is NaN until it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .emulator.allocations import Allocator, allocators_wrapped


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives return with NaN, so that forgotten elements show.

    Integer tensors are left as they are. Only calls from Python are seen, which is where kernels get their outputs.
    """

    def poisoned(allocate: Allocator) -> Allocator:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(torch.nan)
            return tensor

        return allocate_poisoned

    with allocators_wrapped(poisoned):
        yield
