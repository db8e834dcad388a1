"""Every comparison has a case that takes no time, so that ``--tiny`` shows of each that it runs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from trifuse.benchmarks.harness import TINY, Comparison

FILES = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_every_comparison_has_a_tiny_case(name):
    module = importlib.import_module(f"trifuse.benchmarks.{name}")
    comparisons = [value for value in vars(module).values() if isinstance(value, Comparison)]
    assert comparisons
    for comparison in comparisons:
        assert any(case.devices == (TINY,) for case in comparison.cases), comparison.name
