"""The decoder of FIAS: four mixing-attention blocks from the coarsest map upwards, logits from the last three."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.blocks.conv_norm_relu import ConvNormReLU, init_convs
from trifuse.blocks.mixing_attention import MixingAttention, UpsampledJoin
from trifuse.kernels.errors import ShapeError

BottleneckKind = Literal["conv", "none", "down"]
HEAD_INIT_STD = 0.01


class PlainBlock(nn.Module):
    """A decoder block without attention: two convolutions after the concatenation."""

    def __init__(self, dim: int, in_dim: int | None, norm: str) -> None:
        super().__init__()
        self.join = UpsampledJoin(dim, in_dim, norm)
        self.out = ConvNormReLU(dim, dim, norm)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        init_convs(self, generator)

    def forward(self, x: Tensor, skip: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode ``x`` with ``skip``; there is nothing to draw from the generator."""
        return self.out(self.join(x, skip))


class Bottleneck(nn.Module):
    """Make what the decoder starts from out of the coarsest map: (B, C, H, W) -> (B, C, H, W).

    Args:
        kind: ``"conv"``, a 3x3 convolution; ``"none"``, the map itself; ``"down"``, a convolution at half the size.
        dim: channels C.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.
    """

    def __init__(self, kind: str, dim: int, norm: str = "batch") -> None:
        super().__init__()
        self.halves = kind == "down"
        self.conv = nn.Identity() if kind == "none" else ConvNormReLU(dim, dim, norm, stride=2 if self.halves else 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.halves and (height % 2 or width % 2):
            raise ShapeError(
                f"Fias: bottleneck 'down' needs a coarsest map of even sides, got {height} x {width}; "
                "use images whose sides are multiples of 64, or bottleneck='conv'"
            )
        x = self.conv(x)
        return F.interpolate(x, size=(height, width), mode="bilinear") if self.halves else x


class FiasDecoder(nn.Module):
    """Decode four maps, finest first, into the logits of three sizes, coarsest first.

    Args:
        dims: channels of the four maps, finest first.
        num_heads: attention heads of the four blocks, coarsest first.
        num_classes: channels K of the logits.
        mixing: whether the blocks attend; else they are two convolutions each.
        bottleneck: see `Bottleneck`.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.
        block: further arguments of `MixingAttention`.

    Source: FIAS, Eqs. 7-10; the last three blocks have heads.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        num_heads: tuple[int, ...] = (8, 6, 4, 2),
        num_classes: int = 9,
        mixing: bool = True,
        bottleneck: str = "conv",
        norm: str = "batch",
        **block: Any,
    ) -> None:
        super().__init__()
        self.dims, coarse_first = list(dims), dims[::-1]
        self.bottleneck = Bottleneck(bottleneck, coarse_first[0], norm)
        self.blocks = nn.ModuleList(
            [
                MixingAttention(dim, heads, in_dim, norm=norm, **block) if mixing else PlainBlock(dim, in_dim, norm)
                for dim, heads, in_dim in zip(coarse_first, num_heads, (None, *coarse_first), strict=False)
            ]
        )
        self.heads = nn.ModuleList([nn.Conv2d(dim, num_classes, 1) for dim in coarse_first[1:]])
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: He's normal distribution over the fan-out, and a small one for the heads."""
        init_convs(self.bottleneck, generator)
        for block in self.blocks:
            block.reset_parameters(generator)  # type: ignore[operator]
        for head in self.heads:
            nn.init.normal_(head.weight, std=HEAD_INIT_STD, generator=generator)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, maps: list[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        """Decode maps (B, C_l, h_l, w_l), finest first, into logits (B, K, h_l, w_l) of the last three, coarsest first.

        Raises:
            ShapeError: not four maps, or maps of other channels or sizes than the blocks expect.
        """
        if [x.shape[1] for x in maps] != self.dims:
            raise ShapeError(
                f"FiasDecoder: expected maps of {', '.join(map(str, self.dims))} channels, finest first, got "
                f"{[tuple(x.shape) for x in maps]}"
            )
        skips = maps[::-1]
        x = self.blocks[0](self.bottleneck(skips[0]), skips[0], generator)
        logits = []
        for block, head, skip in zip(self.blocks[1:], self.heads, skips[1:], strict=True):
            x = block(x, skip, generator)
            logits.append(head(x).contiguous())  # losses read a class at a time
        return logits
