"""Fixtures of the operators' tests: which form small tensors take."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

WITH_PLAIN_FORMS = ("kernels.cpu.segmentation_sums", "kernels.ops.gates", "kernels.ops.segment_film_gate")


@pytest.fixture(autouse=True)
def _nothing_is_too_small(monkeypatch):
    """On a CPU small tensors are left to PyTorch's gradients: `test_small_tensors.py` tests that, the others ours."""
    for module in WITH_PLAIN_FORMS:
        monkeypatch.setattr(import_module(f"trifuse.{module}"), "FEWEST_ELEMENTS", 0)


@pytest.fixture
def low_tiles():
    """The interpreter takes its time for each column of a lane: most tests do with few."""
    if torch.cuda.is_available():
        yield
        return
    from trifuse.kernels.gpu import tuning

    forward = import_module("trifuse.kernels.gpu.depthwise_multi_kernel").convolve
    backward = import_module("trifuse.kernels.gpu.depthwise_multi_kernel_backward").weight_gradients
    with tuning.forced(forward, {"columns": 2}), tuning.forced(backward, {"columns": 2}):
        yield
