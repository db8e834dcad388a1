"""What a benchmark file needs: the harness of `trifuse.kernels.testing.comparing`, and a clock for pytest-benchmark.

A benchmark file holds comparisons, and a test for each that shows them (see any ``bench_*.py``)::

    pytest benchmarks/bench_weighted_block_fusion.py --benchmark-only

pytest-benchmark shows the samples and `benchmarks/results` keeps the figures, written after each case and pass.
"""

from __future__ import annotations

from pathlib import Path

from trifuse.kernels.testing import Timing, clock, replay
from trifuse.kernels.testing.comparing import TINY, Case, Comparison, Pass, WrongResult, judge
from trifuse.kernels.testing.machine import MIB, default_device

RESULTS = Path(__file__).parent / "results"

__all__ = [
    "MIB",
    "RESULTS",
    "TINY",
    "Case",
    "Comparison",
    "Pass",
    "Timing",
    "WrongResult",
    "clock",
    "default_device",
    "judge",
    "replay",
]
