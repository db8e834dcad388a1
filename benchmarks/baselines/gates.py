"""What the gates, Monte Carlo pooling and context-aware fusion are compared with: what people write without them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def broadcast_channel_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Gate channels as squeeze-and-excitation modules do."""
    return x * torch.sigmoid(gate)[:, :, None, None]


def broadcast_spatial_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Gate positions as spatial attention modules do."""
    return x * torch.sigmoid(gate)


def shuffled_adaptive_pool(x: Tensor, scale: int, cell: int, permutation: Tensor) -> Tensor:
    """Pool as the published module does: permute every map, pool the whole grid, keep one cell."""
    shuffled = x.flatten(2)[:, :, permutation].view(x.shape)
    return F.adaptive_avg_pool2d(shuffled, scale).flatten(2)[:, :, cell]


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


compiled_channel_gate = torch.compile(broadcast_channel_gate, dynamic=False)
compiled_adaptive_pool = torch.compile(shuffled_adaptive_pool, dynamic=False)
compiled_spatial_gate = torch.compile(broadcast_spatial_gate, dynamic=False)
compiled_fusion = torch.compile(fusion_by_the_equations, dynamic=False)
