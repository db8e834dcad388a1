"""The pytest fixture of the virtual GPU; what it needs is imported when a test uses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .emulator import virtual_gpu


@pytest.fixture(name="virtual_gpu")
def virtual_gpu_fixture() -> Iterator[virtual_gpu]:
    """Run the test's Triton kernels as compiled, on CPU tensors; the test errs if faults were found in them.

    Needs a process without TRITON_INTERPRET=1. The value is the running `trifuse.kernels.testing.virtual_gpu`, with its
    ``findings`` and ``launches``.
    """
    from .emulator import virtual_gpu

    with virtual_gpu() as gpu:
        yield gpu
