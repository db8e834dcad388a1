"""FIAS as one would put it together from the published algorithms: the same parameters, none of our operators.

Each class takes over the parameters of one of our blocks, and computes what its paper writes down, step by step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.architectures.fias import Fias
from trifuse.blocks import ContextAwareFusion, DilatedAttention, MixingAttention, MonteCarloAttention
from trifuse.blocks.depthwise_multi_kernel import ParallelKernels
from trifuse.blocks.memory_efficient_attention import MemoryEfficientAttention

DICE_SMOOTHING = 1e-5  # TransUNet's


class UnfoldedAttention(nn.Module):
    """DilateFormer's attention: `unfold` writes out the window of every pixel, for each dilation in turn."""

    def __init__(self, block: DilatedAttention) -> None:
        super().__init__()
        self.qkv, self.proj = block.qkv, block.proj
        self.num_heads, self.dilations = block.num_heads, block.dilations

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        groups, head_dim = len(self.dilations), channels // self.num_heads
        packed = self.qkv(x.permute(0, 3, 1, 2)).view(batch, 3, groups, channels // groups, height, width)
        results = []
        for group, dilation in enumerate(self.dilations):
            q, k, v = packed[:, 0, group], packed[:, 1, group], packed[:, 2, group]
            q = q.reshape(batch, -1, head_dim, 1, height * width).permute(0, 1, 4, 3, 2)
            k, v = (
                F.unfold(t, 3, dilation=dilation, padding=dilation).view(batch, -1, head_dim, 9, height * width)
                for t in (k, v)
            )
            weights = ((q @ k.permute(0, 1, 4, 2, 3)) * head_dim**-0.5).softmax(dim=-1)
            out = weights @ v.permute(0, 1, 4, 3, 2)  # (B, heads, pixels, 1, head_dim)
            results.append(out.transpose(1, 2).reshape(batch, height, width, channels // groups))
        return self.proj(torch.cat(results, dim=-1))


class NaiveAttention(nn.Module):
    """Softmax attention with the whole score matrix in memory."""

    def __init__(self, block: MemoryEfficientAttention) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = block.qkv, block.proj, block.num_heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * (dim // self.num_heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class SeparateKernels(nn.Module):
    """The depthwise convolutions of the multi-kernel encoder one by one, and their sum."""

    def __init__(self, block: ParallelKernels) -> None:
        super().__init__()
        self.convs = block.convs

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for conv in self.convs:
            total = total + conv(x)
        return total


class ConcatenatedFusion(nn.Module):
    """Context-aware fusion on the concatenated maps, as equations 3 to 6 are written, and as the block normalises."""

    def __init__(self, block: ContextAwareFusion) -> None:
        super().__init__()
        self.pre, self.channel, self.reduce = block.pre, block.channel, block.reduce
        self.spatial_global, self.spatial_local, self.spatial = block.spatial_global, block.spatial_local, block.spatial
        self.norm = block.norm

    def forward(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        joined = torch.cat([global_features, local_features], dim=1)
        mixed = self.pre(joined)
        pooled = torch.cat([F.adaptive_avg_pool2d(mixed, 1), F.adaptive_max_pool2d(mixed, 1)], dim=1)
        if self.norm is not None:
            pooled = self.norm(pooled.flatten(1))[:, :, None, None]
        fused = self.reduce(torch.sigmoid(self.channel(pooled)) * joined)
        summed = self.spatial_global(global_features) + self.spatial_local(local_features)
        return torch.sigmoid(self.spatial(summed.mean(dim=1, keepdim=True))) * fused


class ShuffledAttention(nn.Module):
    """Monte Carlo attention that shuffles the whole map, pools it to a grid, and takes one cell; else the mean."""

    def __init__(self, block: MonteCarloAttention) -> None:
        super().__init__()
        self.squeeze, self.excite = block.squeeze, block.excite
        self.draw_cell = block.draw_cell  # the same draw from the same generator

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        if self.training:
            scale, cell, permutation = self.draw_cell(x, generator)
            shuffled = x.flatten(2)[:, :, permutation].view(x.shape)
            pooled = F.adaptive_avg_pool2d(shuffled, int(scale)).flatten(2)[:, :, int(cell), None, None]
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))


def plain_fias(network: Fias) -> Fias:
    """Return a network on the same parameters and buffers in which every fused part is computed plainly."""
    plain = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MixingAttention):
                child.attn = NaiveAttention(child.attn)
            for fused, form in _PLAIN.items():
                if isinstance(child, fused):
                    setattr(parent, name, form(child))
    return plain


_PLAIN = {
    DilatedAttention: UnfoldedAttention,
    ParallelKernels: SeparateKernels,
    ContextAwareFusion: ConcatenatedFusion,
    MonteCarloAttention: ShuffledAttention,
}


def seven_losses(maps: Sequence[Tensor], target: Tensor, gamma: float = 0.4) -> Tensor:
    """The MUTATION loss by upsampled logits and one Dice and one cross-entropy for each subset of the maps."""
    full = [F.interpolate(m, target.shape[1:], mode="bilinear", align_corners=False) for m in maps]
    total = torch.zeros(())
    for size in range(1, len(full) + 1):
        for subset in combinations(full, size):
            logits = sum(subset[1:], start=subset[0])
            total = total + gamma * soft_dice(logits, target) + (1 - gamma) * F.cross_entropy(logits, target)
    return total


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """TransUNet's Dice loss: the mean over classes of one minus the Dice of probabilities, squares below."""
    probabilities = torch.softmax(logits, dim=1)
    one_hot = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).to(probabilities)
    axes = (0, 2, 3)
    intersection = (probabilities * one_hot).sum(axes)
    sizes = probabilities.square().sum(axes) + one_hot.square().sum(axes)
    return (1 - (2 * intersection + DICE_SMOOTHING) / (sizes + DICE_SMOOTHING)).mean()


def labels_plainly(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Upsample every map, add them up, and take the best class of each pixel, as uint8."""
    full = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]
    return sum(full[1:], start=full[0]).argmax(1).to(torch.uint8)
