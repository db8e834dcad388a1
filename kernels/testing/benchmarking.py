"""What pytest needs to time operators: the fixture ``gpu_benchmark``, and a clock that replays what was measured.

Torch is imported at the first use: `trifuse.kernels.testing`, which takes these tools, is loaded by every pytest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from .measuring import Timing, measure


@pytest.fixture
def gpu_benchmark() -> Callable[..., dict[str, Timing]]:
    """Return `measure` for the GPU, or for the CPU where there is none."""
    import torch

    return partial(measure, device="cuda" if torch.cuda.is_available() else "cpu")


class _ReplayClock:
    """A timer that stands still except when it is told how long something took."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


clock = _ReplayClock()
"""The timer of a benchmark that replays what was measured: ``@pytest.mark.benchmark(timer=clock)``.

There is one measurement. pytest-benchmark would time one form after the other, and a ratio between two moments of a
shared machine says little.
"""


def replay(benchmark: Any, timing: Timing) -> None:
    """Hand the samples of a timing to pytest-benchmark's ``benchmark`` fixture, whose timer must be `clock`."""
    remaining = iter(timing.seconds)
    benchmark.extra_info["peak_mib"] = round(timing.peak_bytes / 2**20, 2)
    benchmark.pedantic(lambda: clock.advance(next(remaining)), rounds=len(timing.seconds))
