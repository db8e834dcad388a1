"""What context-aware fusion is compared with: its equations, step by step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fusion_by_the_equations(
    first: Tensor,
    second: Tensor,
    pre: Tensor,
    channel: Tensor,
    channel_bias: Tensor,
    reduce: Tensor,
    spatial_first: Tensor,
    spatial_second: Tensor,
    spatial: Tensor,
    spatial_bias: Tensor,
) -> Tensor:
    """Fuse two maps as FIAS' equations 3 to 6 are written; the weights in the order of the block's parameters."""
    both = torch.cat([first, second], dim=1)
    u = F.conv2d(both, pre)
    pooled = torch.cat([F.adaptive_avg_pool2d(u, 1), F.adaptive_max_pool2d(u, 1)], dim=1)
    weights = torch.sigmoid(F.conv2d(pooled, channel, channel_bias))
    fused = F.conv2d(weights * both, reduce)
    total = F.conv2d(first, spatial_first) + F.conv2d(second, spatial_second)
    gate = F.conv2d(total.mean(dim=1, keepdim=True), spatial, spatial_bias, padding=spatial.shape[-1] // 2)
    return torch.sigmoid(gate) * fused


compiled_fusion = torch.compile(fusion_by_the_equations, dynamic=False)
