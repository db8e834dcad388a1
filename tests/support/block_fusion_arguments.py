"""Arguments of weighted block fusion, and how a call on them is compared with the reference."""

from __future__ import annotations

import pytest
import torch

from trifuse.kernels import backend, weighted_block_fusion, weighted_block_fusion_reference
from trifuse.kernels.testing import assert_op_matches, poisoned_empty

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")


def random_arguments(n, b, m, d, dtype=torch.float32, maps_grad=True, logits_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(b, m, d, generator=generator).to(dtype).requires_grad_(maps_grad) for _ in range(n)]
    return maps, torch.randn(n, generator=generator).requires_grad_(logits_grad)


def check(name, maps, logits, *selection):
    """Compare with the reference; each logit's gradient is a difference of dot products, which float32 rounds."""
    atol = 4 * torch.finfo(torch.float32).eps * max(4, maps[0].numel()) ** 0.5
    with backend(name), poisoned_empty():
        assert_op_matches(weighted_block_fusion, weighted_block_fusion_reference, maps, logits, *selection, atol=atol)
