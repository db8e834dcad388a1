"""The decoder of DINO-UNet: from the tokens of a few blocks, and the image itself, to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.blocks.conv_norm_relu import init_convs
from trifuse.blocks.image_branch import ImageBranch, resize_bilinear
from trifuse.blocks.image_input import channels_last
from trifuse.blocks.normalization import make_norm
from trifuse.blocks.plain_layers import dtype_of, norm_relu
from trifuse.blocks.unet_decoder import UNetDecoderStage
from trifuse.kernels.errors import ShapeError

HEAD_INIT_STD = 0.01
Bottleneck = Literal["last+fused", "last", "fused"]
FinalResize = Literal["logits", "features"]


class DinoUNetDecoder(nn.Module):
    """Decode tokens (B, M, D) of a grid (h, w) into logits (B, K, H, W), doubling the grid at every stage.

    ``D_0 = ReLU(norm(proj_last(F_last) + proj_fused(F_fused)))``; then, for each stage j,
    ``D_j = convs(concat(image branch, skip convolution of s_j, upsampled D_{j-1}))``.

    Args:
        embed_dim: token width D.
        channels: channels of each stage, coarsest first; there are as many stages.
        bottleneck_dim: channels of D_0.
        num_classes: channels K of the logits.
        bottleneck: what D_0 is made of: ``"last+fused"``, ``"last"`` or ``"fused"``.
        spatial_integration: whether the image enters each stage.
        conv_then_resize: see `ImageBranch`.
        convs_per_stage: convolutions after each concatenation.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.
        final_resize: what is resized to the image's size: the ``"logits"``, or the last ``"features"`` before them.

    Source: left-atrium segmentation with DINOv2, section II-C and Eq. 3.
    """

    def __init__(
        self,
        embed_dim: int,
        channels: Sequence[int] = (256, 128, 64, 32),
        bottleneck_dim: int = 256,
        num_classes: int = 2,
        bottleneck: str = "last+fused",
        spatial_integration: bool = True,
        conv_then_resize: bool = False,
        convs_per_stage: int = 1,
        norm: str = "batch",
        final_resize: str = "logits",
    ) -> None:
        super().__init__()
        self.resize_features, self.norm = final_resize == "features", norm
        self.proj_last = _projection(embed_dim, bottleneck_dim) if "last" in bottleneck else None
        self.proj_fused = _projection(embed_dim, bottleneck_dim) if "fused" in bottleneck else None
        self.bottleneck_norm = make_norm(norm, bottleneck_dim)
        self.skips = nn.ModuleList([SkipConvolution(embed_dim, dim, norm) for dim in channels])
        self.images = nn.ModuleList(
            [ImageBranch(dim, norm=norm, conv_then_resize=conv_then_resize) for dim in channels if spatial_integration]
        )
        sides = 2 if spatial_integration else 1
        self.stages = nn.ModuleList(
            [
                UNetDecoderStage(in_dim, dim, side_dims=[dim] * sides, convs=convs_per_stage, norm=norm)
                for in_dim, dim in zip([bottleneck_dim, *channels], channels, strict=False)
            ]
        )
        self.head = nn.Conv2d(channels[-1], num_classes, kernel_size=3, padding=1)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: He's normal distribution over the fan-out, and a small one for the head."""
        init_convs(self, generator)
        nn.init.normal_(self.head.weight, std=HEAD_INIT_STD, generator=generator)

    def forward(
        self,
        last: Tensor | None,
        fused: Tensor | None,
        skips: Sequence[Tensor],
        skip_scales: Sequence[Tensor] | None,
        grid: tuple[int, int],
        image: Tensor,
    ) -> Tensor:
        """Decode.

        Args:
            last: tokens of the last block (B, M, D); None where the bottleneck does without them.
            fused: the fused map *after* ``proj_fused``, (B, M, bottleneck_dim); None likewise.
            skips: tokens of the selected blocks, (B, M, D), one for each stage, coarsest stage first.
            skip_scales: a factor for each skip; None leaves them as they are.
            grid: (h, w) with h * w = M.
            image: (B, 3, H, W), the image as the encoder saw it.

        Returns:
            Logits (B, K, H, W).

        Raises:
            ShapeError: not one skip for each stage, tokens of another grid, or a part of the bottleneck is missing.
        """
        self._check(last, fused, skips, grid)
        x = self._bottleneck(last, fused, grid)
        if self.norm == "batch" and image.device.type == "cpu":  # where other norms lose digits in this layout
            image = channels_last(image)
        for j, stage in enumerate(self.stages):
            size = (2 * x.shape[2], 2 * x.shape[3])
            skip = self.skips[j](skips[j], grid, scale=None if skip_scales is None else skip_scales[j])
            sides = [image_branch(image, size) for image_branch in self.images[j : j + 1]]
            x = stage(x, [*sides, resize_bilinear(skip, size)])
        size = (image.shape[2], image.shape[3])
        if self.resize_features:
            return self.head(_resize(x, size))
        return _resize(self.head(x), size)

    def _check(self, last: Tensor | None, fused: Tensor | None, skips: Sequence[Tensor], grid: tuple[int, int]) -> None:
        if len(skips) != len(self.stages):
            raise ShapeError(
                f"DinoUNetDecoder: expected a skip for each of the {len(self.stages)} stages, coarsest first, "
                f"got {len(skips)} of shapes {[tuple(tokens.shape) for tokens in skips]}"
            )
        for name, projection, given in (("last", self.proj_last, last), ("fused", self.proj_fused, fused)):
            if projection is not None and given is None:
                raise ShapeError(f"DinoUNetDecoder: the bottleneck needs {name!r}, got None")
        named = {"last": last, "fused": fused} | {f"skip of stage {j}": skip for j, skip in enumerate(skips, start=1)}
        for name, tokens in named.items():
            if tokens is not None and (tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]):
                raise ShapeError(
                    f"DinoUNetDecoder: expected {name} of shape (B, {grid[0]} * {grid[1]}, D) for the grid {grid}, "
                    f"got {tuple(tokens.shape)}"
                )

    def _bottleneck(self, last: Tensor | None, fused: Tensor | None, grid: tuple[int, int]) -> Tensor:
        parts = []
        if self.proj_last is not None:
            assert last is not None
            parts.append(self.proj_last(last.to(dtype_of(self.proj_last))))
        if self.proj_fused is not None:
            assert fused is not None
            parts.append(fused)
        return norm_relu(self.bottleneck_norm, _as_map(sum(parts[1:], start=parts[0]), grid))


class SkipConvolution(nn.Module):
    """Project a block's tokens (B, M, D) to a stage's channels (B, C, h, w): ``scale * ReLU(norm(project(tokens)))``.

    The scale is positive and is applied after the normalisation: one before it would be cancelled by it, and the block
    weights that it is made of would then receive no gradient while training.
    """

    def __init__(self, embed_dim: int, dim: int, norm: str = "batch") -> None:
        super().__init__()
        self.proj = _projection(embed_dim, dim)
        self.norm = make_norm(norm, dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int], scale: Tensor | None) -> Tensor:
        x = norm_relu(self.norm, _as_map(self.proj(tokens.to(dtype_of(self.proj))), grid))
        return x if scale is None else x * scale.to(x.dtype)


def _projection(embed_dim: int, dim: int) -> nn.Linear:
    """A 1x1 convolution of a map is a linear layer of its tokens, and tokens are what the encoder gives."""
    return nn.Linear(embed_dim, dim, bias=False)


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return rearrange(tokens, "b (h w) c -> b c h w", h=grid[0], w=grid[1])


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear")
