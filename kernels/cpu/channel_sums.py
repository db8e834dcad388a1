"""Sums over every channel of a map, on a CPU, without a product map.

They are the gradients that a batch normalisation's weight and bias get, if it normalises by a mean of 0 and a variance
of 1. PyTorch has that pass vectorised, for maps in planes and for channels innermost.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of fewer elements the product map is made all the same: that takes fewer steps.
FEWEST_ELEMENTS = 1 << 16


def channel_sums(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sums of ``grad * x`` and of ``grad`` over all positions of maps (B, C, H, W), both (B, C)."""
    if x.numel() >= FEWEST_ELEMENTS:
        if x.is_contiguous():  # every channel of every sample is a channel of one sample
            dots, totals = _sums(grad.contiguous().view(1, -1, *x.shape[2:]), x.view(1, -1, *x.shape[2:]), dtype)
            return dots.view(x.shape[:2]), totals.view(x.shape[:2])
        if x.is_contiguous(memory_format=torch.channels_last):
            pairs = zip(grad.contiguous(memory_format=torch.channels_last).split(1), x.split(1), strict=True)
            each = [_sums(*pair, dtype) for pair in pairs]
            return torch.stack([dots for dots, _ in each]), torch.stack([totals for _, totals in each])
    wide = grad.to(dtype)
    return (wide * x.to(dtype)).sum((2, 3)), wide.sum((2, 3))


def _sums(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return both sums (C,) over the positions of a single sample (1, C, H, W)."""
    mean, variance = torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
    unused = torch.empty(0, dtype=dtype)
    _, dots, totals = torch.ops.aten.native_batch_norm_backward(
        grad, x, variance, mean, variance, unused, unused, False, 0.0, [False, True, True]
    )
    return dots, totals
