"""What the depthwise multi-kernel convolution is compared with: two convolutions added up, and one merged by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def separate_convolutions(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Convolve with each kernel on its own, and add up: what one writes down from the paper."""
    total = x
    for weight in weights:
        total = total + F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2, groups=x.shape[1])
    return total


def merged_by_hand(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Convolve once, with the sum of the padded kernels, by PyTorch's own convolution: cuDNN's on a GPU."""
    side = max(weight.shape[-1] for weight in weights)
    merged = sum(F.pad(weight, [(side - weight.shape[-1]) // 2] * 4) for weight in weights)
    itself = F.pad(torch.ones((1, 1, 1, 1), dtype=x.dtype, device=x.device), [side // 2] * 4)
    return F.conv2d(x, merged.to(x.dtype) + itself, padding=side // 2, groups=x.shape[1])


compiled_separate_convolutions = torch.compile(separate_convolutions, dynamic=False)
