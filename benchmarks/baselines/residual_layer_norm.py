"""What the residual sum and its layer norm are compared with: PyTorch's operations, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def add_then_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weigh and add, then normalise, as vision transformers do; PyTorch wants one type for all."""
    total = x + branch if layer_scale is None else x + branch * layer_scale.to(x.dtype)
    return total, F.layer_norm(total, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), 1e-6)


compiled_add_then_norm = torch.compile(add_then_norm, dynamic=False)
