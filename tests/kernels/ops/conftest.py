"""A fixture of the depthwise multi-kernel convolution's tests, which lie in several files."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch


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
