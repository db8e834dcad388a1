"""Multi-head self-attention over tokens, with memory linear in their number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trifuse.kernels import ShapeError, memory_efficient_attention

from .rotary_positions import RotaryPositions

INIT_STD = 0.02


class MemoryEfficientAttention(nn.Module):
    """Let every token attend to every other one: (B, M, D) -> (B, M, D).

    One projection makes queries, keys and values; its rows are ordered (q | k | v, head, channel), as in DINOv2 and
    timm, whose weights load by name. ``rotary`` turns queries and keys by the positions of their patches.

    Args:
        dim: token width D.
        num_heads: number of heads h; D must be a multiple of it.
        qkv_bias: whether the first projection has a bias.

    Raises:
        ShapeError: D is no multiple of the number of heads.

    Source: Vaswani et al., Attention Is All You Need, section 3.2.2.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ShapeError(f"MemoryEfficientAttention: dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both weights from a normal distribution of deviation 0.02 cut at two units, and set biases to zero."""
        for linear in (self.qkv, self.proj):
            init_linear(linear, generator)

    def forward(self, x: Tensor, rotary: RotaryPositions | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        if rotary is not None:
            q, k = rotary.rotate(q), rotary.rotate(k)
        out: Tensor = self.proj(memory_efficient_attention(q, k, v).flatten(-2))
        return out

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def init_linear(linear: nn.Linear, generator: torch.Generator | None = None) -> None:
    """Initialise a linear layer as vision transformers do: truncated normal weight of deviation 0.02, zero bias."""
    nn.init.trunc_normal_(linear.weight, std=INIT_STD, generator=generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
