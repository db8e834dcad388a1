"""What Triton asks of a driver where kernels are interpreted: where the clock is, and a cache to clear."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import triton
from quick_interpreter import quick_interpreter
from triton import testing
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

do_bench = testing.do_bench
"""Triton's own clock, which runs a kernel dozens of times."""
_FOR_EVER = ExitStack()
_TIMED: dict[Any, float] = {}


class Driver(GPUDriver):
    """Knows what `triton.testing.do_bench` needs; it launches nothing."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("the stand-in GPU launches no compiled kernel")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        return testing.do_bench

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1 << 16, dtype=torch.int, device="cuda")

    def clear_cache(self, cache: torch.Tensor) -> None:
        cache.zero_()


def one_timed_run(run: Callable[[], object], **options: Any) -> float:
    """Return the milliseconds of one run, where Triton's clock would take the median of many.

    Of each form of a launcher that is the first one in this process, whatever the shapes.
    """
    form = (run.func, str(run.args[0])) if isinstance(run, partial) else run
    if form not in _TIMED:
        start = time.perf_counter()
        run()
        _TIMED[form] = (time.perf_counter() - start) * 1e3
    return _TIMED[form]


def install() -> None:
    """Let Triton ask this driver, interpret quickly, and time a form once."""
    triton.runtime.driver.set_active(Driver())
    _FOR_EVER.enter_context(quick_interpreter())
    testing.do_bench = one_timed_run
