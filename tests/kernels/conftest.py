"""Kernel tests run with memory that is poisoned until it is written, and round bfloat16 as a GPU does."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

from trifuse.kernels.testing import poisoned_empty


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_empty():
        yield


@pytest.fixture(autouse=True, scope="session")
def _interpreter_rounds_bfloat16():
    """Let the interpreter round to the nearest bfloat16 where it cuts off: a tolerance for that would hide errors."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        to_even = np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
        with np.errstate(over="ignore"):
            return np.where(np.isnan(values), np.uint32(0x7FC0), (bits + to_even) >> 16).astype(np.uint16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield
