"""A small vision transformer with the attributes and the method by which timm's models are asked for their maps.

Written from timm's documented interface: ``feature_info``, ``blocks``, ``norm``, ``num_prefix_tokens`` and
``forward_intermediates``.
"""

from __future__ import annotations

import torch
from torch import nn

from trifuse.blocks import TransformerBlock


class TimmStyleVit(nn.Module):
    """``dim`` wide, ``depth`` deep, patches of ``patch`` pixels, a class token and ``registers`` register tokens."""

    def __init__(self, dim=16, depth=4, patch=8, registers=2, reach=True):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, stride=patch)
        self.patch_embed.norm = nn.Identity()
        self.prefix = nn.Parameter(torch.randn(1, 1 + registers, dim))
        self.num_prefix_tokens = 1 + registers
        self.norm = nn.LayerNorm(dim)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        blocks = [TransformerBlock(dim, num_heads=2) for _ in range(depth)]
        setattr(self, "blocks" if reach else "stages", nn.Sequential(*blocks))
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": dim, "reduction": patch} for i in range(depth)]
        self.ran = []

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        assert output_fmt == "NCHW"
        assert intermediates_only
        height, width = (side // self.patch_embed.proj.stride[0] for side in x.shape[-2:])
        x = self.patch_embed.proj(x).flatten(2).mT
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        maps = []
        for index, block in enumerate(getattr(self, "blocks", None) or self.stages):
            if stop_early and index > max(indices):
                break
            self.ran.append(index)
            x = block(x)
            if index in indices:
                tokens = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :]
                maps.append(tokens.mT.reshape(len(x), -1, height, width))
        return maps


class TimmStyleStages(nn.Module):
    """Stages of blocks with a ``token_mixer``, as timm's MetaFormers have them, on maps (B, C, H, W)."""

    def __init__(self, dims=(16, 32), depths=(1, 2)):
        super().__init__()
        self.stages = nn.Sequential()
        self.feature_info = [{"num_chs": dim, "module": f"stages.{i}"} for i, dim in enumerate(dims)]
        for width, dim, depth in zip((3, *dims), dims, depths, strict=False):
            stage = nn.Module()
            stage.downsample = nn.Conv2d(width, dim, 2, stride=2)
            stage.blocks = nn.Sequential(*(_TokenMixing(dim) for _ in range(depth)))
            stage.forward = lambda x, stage=stage: stage.blocks(stage.downsample(x))
            self.stages.append(stage)

    def forward(self, x):
        return self.stages(x).mean((2, 3))


class _TokenMixing(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim)
        self.token_mixer = nn.AvgPool2d(3, stride=1, padding=1)
        self.mlp = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        x = x + self.token_mixer(self.norm1(x))
        return x + self.mlp(x)
