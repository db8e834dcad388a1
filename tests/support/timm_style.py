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
