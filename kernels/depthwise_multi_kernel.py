"""Depthwise convolutions of several kernel sizes on one map, added up: computed as one convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

OP = "depthwise_multi_kernel"


def depthwise_multi_kernel_reference(x: Tensor, weights: Sequence[Tensor], *, residual: bool = True) -> Tensor:
    """Define `depthwise_multi_kernel`: convolve with each kernel, add up."""
    kept = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(kept)
    total = wide if residual else torch.zeros_like(wide)
    with torch.autocast(x.device.type, enabled=False):
        for weight in weights:
            total = total + F.conv2d(wide, weight.to(kept), padding=weight.shape[-1] // 2, groups=x.shape[1])
    return total.to(x.dtype)


def _merged(weights: Sequence[Tensor], residual: bool, dtype: torch.dtype) -> Tensor:
    """Return the one kernel (C, 1, K, K) that does what all of them do together."""
    side = max(weight.shape[-1] for weight in weights)
    total = sum(F.pad(weight.to(dtype), [(side - weight.shape[-1]) // 2] * 4) for weight in weights)
    if residual:
        total = total + F.pad(torch.ones((1, 1, 1, 1), dtype=dtype, device=weights[0].device), [side // 2] * 4)
    return total


def depthwise_multi_kernel(x: Tensor, weights: Sequence[Tensor], *, residual: bool = True) -> Tensor:
    """Convolve each channel with several kernels around the same centre, and add up."""
    merged = _merged(weights, residual, torch.promote_types(x.dtype, torch.float32))
    out = F.conv2d(x.to(merged.dtype), merged, padding=merged.shape[-1] // 2, groups=x.shape[1])
    return out.to(x.dtype)
