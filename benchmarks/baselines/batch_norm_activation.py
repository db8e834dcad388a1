"""What batch norm with activation is compared with: PyTorch's two layers, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def norm_then_rectifier(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor, bias: Tensor
) -> Tensor:
    """Normalise by the batch's statistics and rectify, as the layers of a network do in training."""
    return torch.relu(F.batch_norm(x, running_mean, running_var, weight, bias, training=True))


def norm_then_rectifier_in_place(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor, bias: Tensor
) -> Tensor:
    """Normalise, and rectify what that wrote, which its gradient does not need."""
    return F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, training=True), inplace=True)


compiled_norm = torch.compile(norm_then_rectifier, dynamic=False)
