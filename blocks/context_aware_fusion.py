"""Context-aware fusion: two maps of one scene, weighed by channel and by position, become one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import ShapeError, spatial_gate

from .conv_norm_relu import init_convs

SPATIAL_POOLS = ("channel", "local3", "none")


class ContextAwareFusion(nn.Module):
    """Fuse a global and a local map: two of (B, C, H, W) -> (B, C, H, W)."""

    def __init__(
        self,
        dim: int,
        spatial_pool: str = "channel",
        spatial_kernel: int = 7,
        max_pool: bool = True,
        pre_conv: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.spatial_pool, self.max_pool = dim, spatial_pool, max_pool
        self.pre = nn.Conv2d(2 * dim, 2 * dim, 1, bias=False) if pre_conv else None
        self.channel = nn.Conv2d((4 if max_pool else 2) * dim, 2 * dim, 1)
        self.reduce = nn.Conv2d(2 * dim, dim, 1, bias=False)
        width = 1 if spatial_pool == "none" else dim
        self.spatial_global = nn.Conv2d(dim, width, 1, bias=spatial_pool == "none")
        self.spatial_local = nn.Conv2d(dim, width, 1, bias=False)
        self.spatial = None
        if spatial_pool != "none":
            channels = 1 if spatial_pool == "channel" else dim
            self.spatial = nn.Conv2d(channels, 1, spatial_kernel, padding=spatial_kernel // 2)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights from He's normal distribution over the fan-out; gates start unbiased, near one half."""
        init_convs(self, generator)

    def forward(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        if global_features.shape != local_features.shape:
            raise ShapeError(
                f"ContextAwareFusion: local_features has shape {tuple(local_features.shape)}; expected "
                f"{tuple(global_features.shape)}, the shape of global_features"
            )
        both = torch.cat([global_features, local_features], dim=1)
        u = both if self.pre is None else self.pre(both)
        pooled = u.mean((2, 3), keepdim=True)
        if self.max_pool:
            pooled = torch.cat([pooled, u.amax((2, 3), keepdim=True)], dim=1)
        fused = self.reduce(torch.sigmoid(self.channel(pooled)) * both)
        gate = self.spatial_global(global_features) + self.spatial_local(local_features)
        if self.spatial_pool == "channel":
            gate = gate.mean(1, keepdim=True)
        if self.spatial_pool == "local3":
            gate = F.avg_pool2d(gate, 3, stride=1, padding=1, count_include_pad=False)
        return spatial_gate(fused, gate if self.spatial is None else self.spatial(gate))
