"""Kernel tests run with memory that is poisoned until it is written."""

from __future__ import annotations

import pytest

from trifuse.kernels.testing import poisoned_empty


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_empty():
        yield
