"""Arguments of the depthwise multi-kernel convolution, and how a call is compared with the reference."""

from __future__ import annotations

import pytest
import torch

from trifuse.kernels import backend, depthwise_multi_kernel, depthwise_multi_kernel_reference
from trifuse.kernels.testing import assert_op_matches, poisoned_empty

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")


def random_arguments(shape, sides, dtype=torch.float32, x_grad=True, weights_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_(x_grad)
    weights = [torch.randn(shape[1], 1, k, k, generator=generator).requires_grad_(weights_grad) for k in sides]
    return x, weights


def check(name, x, weights, residual=True):
    """Compare with the reference; a kernel's gradient adds up all pixels, a value all taps."""
    terms = max(4, x.numel() // max(1, x.shape[1]), sum(weight.shape[-1] ** 2 for weight in weights))
    atol = 8 * torch.finfo(torch.float32).eps * terms
    if name == "triton" and x.dtype == torch.bfloat16:
        atol += 8 * torch.finfo(torch.bfloat16).eps  # the interpreter cuts off what a GPU rounds
    with backend(name), poisoned_empty():
        assert_op_matches(
            depthwise_multi_kernel, depthwise_multi_kernel_reference, x, weights, residual=residual, atol=atol
        )
