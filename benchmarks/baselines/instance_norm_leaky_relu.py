"""What instance norm with leaky rectifier is compared with: PyTorch's two layers, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def norm_then_rectifier(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise and rectify as nnU-Net's layers do; PyTorch wants one type for the map, the weight and the bias."""
    normalised = F.instance_norm(x, weight=weight.to(x.dtype), bias=bias.to(x.dtype))
    return F.leaky_relu(normalised, 0.01, inplace=True)


def groups_then_rectifier(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise in groups of one channel, which is the same, and rectify."""
    normalised = F.group_norm(x, x.shape[1], weight.to(x.dtype), bias.to(x.dtype))
    return F.leaky_relu(normalised, 0.01, inplace=True)


compiled_norm = torch.compile(norm_then_rectifier, dynamic=False)
