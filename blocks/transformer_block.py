"""The pre-norm transformer block of DINOv2 and DINOv3, and its parts, by the names of the published weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer_scale import LayerScale
from .memory_efficient_attention import MemoryEfficientAttention, init_linear
from .plain_layers import add_and_normalise, as_its_class_says, normalise
from .rotary_positions import RotaryPositions

LAYER_NORM_EPS = 1e-6


class Mlp(nn.Module):
    """Widen, apply the exact GELU, narrow: (B, M, D) -> (B, M, D)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for linear in (self.fc1, self.fc2):
            init_linear(linear, generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGLU(nn.Module):
    """Gate one widened half by the other: ``w3(silu(a) * b)`` with ``a, b = w12(x)``: (B, M, D) -> (B, M, D).

    Source: Shazeer, GLU Variants Improve Transformer, Eq. 6.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for linear in (self.w12, self.w3):
            init_linear(linear, generator)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class TransformerBlock(nn.Module):
    """Attend, then transform each token: ``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``.

    Args:
        dim: token width D.
        num_heads: number of attention heads.
        mlp_ratio: width of the hidden layer over D.
        ffn: ``"mlp"`` (Linear, GELU, Linear) or ``"swiglu"``, whose hidden width is two thirds of the MLP's, rounded up
            to a multiple of 8, so that both cost the same.
        init_values: first value of both LayerScale factors.
        qkv_bias: whether queries, keys and values have a bias.
        eps: what both norms add to the variance.

    Raises:
        ShapeError: D is no multiple of the number of heads.
        ValueError: ``ffn`` is neither of the two.

    Source: Oquab et al., DINOv2, section 4 and appendix B.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        ffn: str = "mlp",
        init_values: float = 1.0,
        *,
        qkv_bias: bool = True,
        eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = MemoryEfficientAttention(dim, num_heads, qkv_bias)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = _feed_forward(ffn, dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the constructor did."""
        for norm in (self.norm1, self.norm2):
            norm.reset_parameters()
        for part in (self.attn, self.ls1, self.mlp, self.ls2):
            part.reset_parameters(generator)

    def forward(self, x: Tensor, rotary: RotaryPositions | None = None) -> Tensor:
        return self._forward_normalised(x, normalise(self.norm1, x), None, rotary)[0]

    def _forward_normalised(
        self, x: Tensor, normalised: Tensor, following: nn.Module | None, rotary: RotaryPositions | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the block's result for x, of which ``norm1(x)`` is known, and what ``following`` makes of the result.

        What the last norm of one block and the first of the next read is written once, and each sum is normalised
        while it is at hand.
        """
        positions = () if rotary is None else (rotary,)  # an attention of another class need not know of them
        x, normalised = add_and_normalise(x, self.attn(normalised, *positions), self.norm2, layer_scale=self.ls1)
        if following is None:
            return self.ls2(x, self.mlp(normalised)), None
        return add_and_normalise(x, self.mlp(normalised), following, layer_scale=self.ls2)


def iterate_blocks(blocks: Sequence[nn.Module], x: Tensor, rotary: RotaryPositions | None = None) -> Iterator[Tensor]:
    """Yield the results of pre-norm blocks, each called on the result of the one before, the first on x (B, M, D).

    Between two `TransformerBlock` that are what their class says, the sum that ends the first is normalised for the
    second in the same pass. Any other block, and one with hooks, is called. ``rotary`` is handed to each.
    """
    normalised = None
    for block, after in zip_longest(blocks, blocks[1:]):
        if type(block) is TransformerBlock and as_its_class_says(block):
            following = after.norm1 if type(after) is TransformerBlock and as_its_class_says(after) else None
            normalised = normalise(block.norm1, x) if normalised is None else normalised
            x, normalised = block._forward_normalised(x, normalised, following, rotary)
        else:
            x, normalised = block(x) if rotary is None else block(x, rotary), None
        yield x


def _feed_forward(ffn: str, dim: int, hidden_dim: int) -> Mlp | SwiGLU:
    if ffn == "mlp":
        return Mlp(dim, hidden_dim)
    if ffn == "swiglu":
        return SwiGLU(dim, 8 * -(-int(hidden_dim * 2 / 3) // 8))
    raise ValueError(f"TransformerBlock: expected ffn 'mlp' or 'swiglu', got {ffn!r}")
