"""The mixing-attention decoder block: self-attention over pixels, mixed with Monte Carlo attention over channels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels.choices import check_choice
from trifuse.kernels.errors import ShapeError

from .conv_norm_relu import ConvNormReLU, init_convs
from .memory_efficient_attention import MemoryEfficientAttention, init_linear
from .monte_carlo_attention import MonteCarloAttention
from .plain_layers import normalise
from .transformer_block import LAYER_NORM_EPS

PositionalEncoding = Literal["none", "dwconv"]


class UpsampledJoin(nn.Module):
    """Bring a map to a skip map and join them: ``conv(concat(conv(upsample(x)), skip))``.

    Args:
        dim: channels C of the skip map and of the result.
        in_dim: channels of the map from the block below, which is upsampled by 2 and convolved to C; None takes a map
            that has the channels and the size of the skip map already.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.
    """

    def __init__(self, dim: int, in_dim: int | None = None, norm: str = "batch") -> None:
        super().__init__()
        self.in_dim, self.dim = in_dim, dim
        self.up = None if in_dim is None else ConvNormReLU(in_dim, dim, norm)
        self.conv = ConvNormReLU(2 * dim, dim, norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join ``x`` (B, in_dim, H, W) and ``skip`` (B, C, 2H, 2W), or both of (B, C, H, W), to the shape of ``skip``.

        Raises:
            ShapeError: the two do not fit.
        """
        scale, channels = (1, self.dim) if self.up is None else (2, self.in_dim)
        wanted = (x.shape[0], self.dim, scale * x.shape[-2], scale * x.shape[-1])
        if x.ndim != 4 or x.shape[1] != channels or skip.shape != wanted:
            raise ShapeError(
                f"decoder block: expected a map (B, {channels}, H, W) and a skip map "
                f"(B, {self.dim}, {scale} H, {scale} W), got {tuple(x.shape)} and {tuple(skip.shape)}"
            )
        if self.up is not None:
            x = self.up(F.interpolate(x, size=skip.shape[-2:], mode="bilinear"))
        out: Tensor = self.conv(torch.cat([x, skip], dim=1))
        return out


class MixingAttention(nn.Module):
    """Decode one step with attention over pixels and over channels: (B, in_dim, H, W) -> (B, C, 2H, 2W).

        P1 = dropout(join(x, skip))
        A  = MHSA(LayerNorm(P1))               computed once, used twice
        P2 = A + P1
        P  = ReLU(norm(conv3x3(MCA(P2) + A)))

    Args:
        dim: channels C of the result and of the skip map.
        num_heads: heads of the self-attention.
        in_dim: channels of the map from the block below; None for the first block, whose map has the channels and the
            size of its skip map.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.
        dropout: probability with which an entry of P1 is dropped while training.
        pos: ``"none"``, or ``"dwconv"`` to let a depthwise 3x3 convolution tell the self-attention positions.
        mca: arguments of `MonteCarloAttention`.

    Raises:
        ShapeError: C is no multiple of ``num_heads``.
        ValueError: an unknown norm or ``pos``, or a probability outside [0, 1).

    Source: FIAS, Eqs. 7-10.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        in_dim: int | None = None,
        *,
        norm: str = "batch",
        dropout: float = 0.1,
        pos: str = "none",
        **mca: Any,
    ) -> None:
        super().__init__()
        check_choice("MixingAttention: pos", pos, PositionalEncoding)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"MixingAttention: expected dropout in [0, 1), got {dropout}")
        self.join = UpsampledJoin(dim, in_dim, norm)
        self.dropout = nn.Dropout(dropout)
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if pos == "dwconv" else None
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = MemoryEfficientAttention(dim, num_heads)
        self.mca = MonteCarloAttention(dim, **mca)
        self.out = ConvNormReLU(dim, dim, norm)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw convolutions from He's normal distribution, the attention's weights from a truncated normal."""
        init_convs(self, generator)
        for layer in self.attn.modules():
            if isinstance(layer, nn.Linear):
                init_linear(layer, generator)
        self.mca.reset_parameters(generator)

    def forward(self, x: Tensor, skip: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode ``x`` (B, in_dim, H, W) with ``skip`` (B, C, 2H, 2W); see `UpsampledJoin`.

        The generator is the source of the Monte Carlo draw; None means PyTorch's global one.

        Raises:
            ShapeError: the two maps do not fit.
        """
        joined = self.dropout(self.join(x, skip))
        attended = self._attend(joined)
        out: Tensor = self.out(self.mca(attended + joined, generator) + attended)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        """Let every pixel of (B, C, H, W) attend to all others."""
        if self.pos is not None:
            x = x + self.pos(x)
        tokens = normalise(self.norm, x.flatten(2).transpose(1, 2))
        attended: Tensor = self.attn(tokens).transpose(1, 2).unflatten(2, x.shape[-2:])
        return attended
