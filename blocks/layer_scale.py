"""LayerScale: a learned factor of each channel, by which a branch is weighted before it is added to its residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Add a branch to its residual, each channel weighted by a learned factor: ``residual + gamma * branch``.

    Both are of shape (..., D); one pass over memory does both steps.

    Source: Touvron et al., Going deeper with Image Transformers, Eq. 4.
    """

    def __init__(self, dim: int, init_values: float = 1.0) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(residual, branch, self.gamma)
