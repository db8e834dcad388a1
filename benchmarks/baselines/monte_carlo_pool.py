"""What Monte Carlo pooling is compared with: a shuffle that copies the map, and adaptive pooling of all cells."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def shuffled_adaptive_pool(x: Tensor, scale: int, cell: int, permutation: Tensor) -> Tensor:
    """Pool as the published module does: permute every map, pool the whole grid, keep one cell."""
    shuffled = x.flatten(2)[:, :, permutation].view(x.shape)
    return F.adaptive_avg_pool2d(shuffled, scale).flatten(2)[:, :, cell]


compiled_adaptive_pool = torch.compile(shuffled_adaptive_pool, dynamic=False)
