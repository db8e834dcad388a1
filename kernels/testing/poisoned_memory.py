"""Memory that is NaN until it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives return with NaN, so that forgotten elements show.

    Integer tensors are left as they are. Only calls from Python are seen, which is where kernels get their outputs.
    """

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(torch.nan)
            return tensor

        return allocate_poisoned

    with torch.device("cpu"):
        torch.empty(0)  # now torch knows what `torch.device` as a context is for, and keeps it: not our functions
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
