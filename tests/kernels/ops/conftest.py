"""A fixture of the depthwise multi-kernel convolution's tests, which lie in several files."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch


@pytest.fixture
def low_tiles():
    """The interpreter takes its time for each row of a tile: most tests do with few rows."""
    if torch.cuda.is_available():
        yield
        return
    from trifuse.kernels.gpu import tuning

    gpu = import_module("trifuse.kernels.gpu.depthwise_multi_kernel")
    with tuning.forced(gpu.convolve, {"rows": 2}), tuning.forced(gpu.weight_gradients, {"rows": 2}):
        yield
