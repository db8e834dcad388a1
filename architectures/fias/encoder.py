"""The encoder of FIAS: a DilateFormer for context, multi-kernel convolutions for detail, fused level by level.

G_l = DilateFormer(x)_l,  L_l = DMK(x)_l,  F_l = CAF_l(G_l, L_l)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from trifuse.blocks.context_aware_fusion import ContextAwareFusion
from trifuse.blocks.conv_norm_relu import ConvNormReLU, init_convs
from trifuse.blocks.depthwise_multi_kernel import DepthwiseMultiKernel

Adapter = Literal["conv", "repeat", "merit", "none"]
Fusion = Literal["caf", "sum", "concat"]


class InputAdapter(nn.Module):
    """Bring images of any channels to the three that the DilateFormer takes: (B, in_channels, H, W) -> (B, 3, H, W).

    Args:
        kind: ``"conv"``, a 1x1 convolution; ``"merit"``, one that is normalised and rectified; ``"repeat"`` a grey
            image; ``"none"``, for images of three channels.
        in_channels: channels of the images.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.
    """

    def __init__(self, kind: str, in_channels: int, norm: str = "batch") -> None:
        super().__init__()
        self.conv: nn.Module = nn.Identity()
        if kind == "conv":
            self.conv = nn.Conv2d(in_channels, 3, 1)
        elif kind == "merit":
            self.conv = ConvNormReLU(in_channels, 3, norm, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).expand(-1, 3, -1, -1)


class LocalEncoder(nn.Module):
    """Turn images (B, 3, H, W) into four maps (B, C_l, H/4, W/4), ..., (B, 8 C_l, H/32, W/32) by convolutions alone.

    Args:
        dims: channels of the four maps; the stem has half of the first.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.
        dmk: further arguments of `DepthwiseMultiKernel`.

    Source: FIAS, Eqs. 1-2.
    """

    def __init__(self, dims: tuple[int, ...], norm: str = "batch", **dmk: Any) -> None:
        super().__init__()
        stem_dim = dims[0] // 2
        self.stem = ConvNormReLU(3, stem_dim, norm, stride=2)
        self.stages = nn.ModuleList(
            [
                DepthwiseMultiKernel(in_dim, dim, norm=norm, **dmk)
                for in_dim, dim in zip((stem_dim, *dims), dims, strict=False)
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class ConcatFusion(nn.Module):
    """Join two maps by a 1x1 convolution of their concatenation: twice (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        init_convs(self, generator)

    def forward(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        return self.conv(torch.cat([global_features, local_features], dim=1))


class SumFusion(nn.Module):
    """Add two maps."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """There is nothing to draw."""

    def forward(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        return global_features + local_features


def make_fusion(kind: str, dim: int, **caf: Any) -> nn.Module:
    """Return what fuses the global and the local map of one level: ``"caf"``, ``"sum"`` or ``"concat"``."""
    if kind == "caf":
        return ContextAwareFusion(dim, **caf)
    return SumFusion() if kind == "sum" else ConcatFusion(dim)
