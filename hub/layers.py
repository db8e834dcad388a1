"""Layers for the `kernels` package to put in the place of others: forwards alone, which read what their module holds.

A layer has neither a constructor nor another method, so that its forward can run on a module of another class. What it
needs of that module stands in its annotations.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import memory_efficient_attention, residual_layer_norm, weighted_block_fusion
from trifuse.kernels.ops.dilated_attention import packed_dilated_attention


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm`: over the last axis in one pass, over several as PyTorch does."""

    can_torch_compile = True

    weight: Tensor | None
    bias: Tensor | None
    normalized_shape: tuple[int, ...]
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) > 1 or input.ndim < 2:
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return residual_layer_norm(input, None, self.weight, self.bias, eps=self.eps)[1]


class MemoryEfficientAttention(nn.Module):
    """Self-attention of tokens (B, M, D) with one projection for queries, keys and values, as in timm and DINOv2."""

    can_torch_compile = True

    num_heads: int
    qkv: nn.Module
    proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return self.proj(memory_efficient_attention(q, k, v).flatten(-2))


class DilatedAttention(nn.Module):
    """Attention of the pixels of maps (B, H, W, C) to dilated windows, as `trifuse.blocks.DilatedAttention` has it."""

    can_torch_compile = True

    num_heads: int
    kernel_size: int
    dilations: Sequence[int]
    scale: float | None
    border: str
    qkv: nn.Module
    proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        windows = {"num_heads": self.num_heads, "kernel_size": self.kernel_size, "dilations": self.dilations}
        return self.proj(packed_dilated_attention(qkv, **windows, scale=self.scale, border=self.border))


class WeightedBlockFusion(nn.Module):
    """The sum of N maps (B, M, D), a list or stacked, weighted by the softmax of the module's logits (N,)."""

    can_torch_compile = True

    logits: Tensor

    def forward(self, features: Sequence[Tensor] | Tensor) -> Tensor:
        return weighted_block_fusion(features, self.logits)
