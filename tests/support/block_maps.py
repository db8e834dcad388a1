"""Random maps of blocks, and a comparison that suits sums over many of them."""

from __future__ import annotations

import torch


def maps(n, shape=(2, 5, 6), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(n)]


def assert_near(got, wanted, relative):
    """Compare against the largest value, as gradients of many terms deserve."""
    assert got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= relative * wanted.abs().max(), (got, wanted)
