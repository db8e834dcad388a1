"""The pytest fixture of the virtual GPU; what it needs is imported when a test uses it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .emulator import virtual_gpu

PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Take note of a test that came to its end: one that failed or was skipped need not have launched a kernel."""
    yield
    item.stash[PASSED] = True


@pytest.fixture(name="virtual_gpu")
def virtual_gpu_fixture(request: pytest.FixtureRequest) -> Iterator[virtual_gpu]:
    """Run the test's Triton kernels as compiled, on CPU tensors; the test errs if faults were found in them.

    It also errs if it passed without launching any. Needs a process without TRITON_INTERPRET=1. The value is the
    running `trifuse.kernels.testing.virtual_gpu`, with its ``findings`` and ``launches``.
    """
    from .emulator import virtual_gpu

    __tracebackhide__ = True
    with virtual_gpu() as gpu:
        yield gpu
        gpu.expects_launches = request.node.stash.get(PASSED, False)
