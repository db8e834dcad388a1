"""What a benchmark file needs: the harness of `trifuse.kernels.testing.comparing`, and a clock for pytest-benchmark.

A benchmark file holds comparisons, and a test for each that shows them (see any ``bench_*.py``)::

    pytest benchmarks/bench_weighted_block_fusion.py --benchmark-only

pytest-benchmark shows the samples. The figures go to `build/benchmarks`, or the folder after ``--results``, after each
case and pass. `benchmarks/results` is committed and holds whole runs: only ``make bench`` writes there.
"""

from __future__ import annotations

from trifuse.kernels.testing import Timing, clock, replay
from trifuse.kernels.testing.comparing import TINY, Case, Comparison, Pass, WrongResult, judge
from trifuse.kernels.testing.machine import MIB, default_device

__all__ = [
    "MIB",
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
