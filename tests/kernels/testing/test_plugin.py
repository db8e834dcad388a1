"""What pytest loads with trifuse: the fixture, and the names that come when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from trifuse.kernels import testing


def test_gpu_benchmark_runs_everywhere(gpu_benchmark):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(1 << 16, device=device)
    timings = gpu_benchmark({"add": lambda: x + x}, seconds=0.05)
    assert timings["add"].median > 0
    assert timings["add"].peak_bytes >= x.nbytes


def test_names_that_need_torch_come_when_they_are_used():
    assert {name for name in testing.__all__ if getattr(testing, name) is None} == set()
    assert testing.compare.__module__ == "trifuse.kernels.testing.comparing"
    with pytest.raises(AttributeError, match="no attribute 'comparison'"):
        _ = testing.comparison


def test_plugin_is_light():
    """pytest loads the plugin in every project that has trifuse installed: it must not bring heavy packages along."""
    code = (
        "import sys, trifuse.kernels.testing;"
        "sys.exit(' '.join({'torch', 'hypothesis', 'triton', 'numpy'} & set(sys.modules)) or 0)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
