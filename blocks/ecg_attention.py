"""The two attentions of the ECG autoencoder: over the instants of each lead, and over the leads.

A branch holds one pre-norm transformer block for each of its groups, all computed at once: their weights are stacked
along a first axis G, and every product is a batch of G products. Twelve blocks, one for each lead, attend over time; a
single one attends over the twelve leads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import ShapeError, memory_efficient_attention

LAYER_NORM_EPS = 1e-5
MLP_RATIO = 4
WAVELENGTHS = 10_000  # the longest of the sinusoids that tell positions, over 2 pi


class EcgAttention(NamedTuple):
    """Attention weights, averaged over heads; each row adds up to 1.

    Attributes:
        lead: (B, L, L): how much the lead of a row looks at each lead.
        temporal: (B, L, M, M): for each lead, how much the instant of a row looks at each instant.
    """

    lead: Tensor
    temporal: Tensor


class GroupedLinear(nn.Module):
    """Apply to each group its own linear layer: (G, N, in_dim) -> (G, N, out_dim).

    Args:
        groups: number of groups G.
        in_dim: input width.
        out_dim: output width.
    """

    def __init__(self, groups: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(groups, out_dim))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weights and biases evenly from +-1 / sqrt(in_dim), as PyTorch's linear layer does."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class GroupedLayerNorm(nn.Module):
    """Normalise the last axis, then scale and shift it by group: (G, N, D) -> (G, N, D).

    Args:
        groups: number of groups G.
        dim: width D.
    """

    def __init__(self, groups: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, dim))
        self.bias = nn.Parameter(torch.zeros(groups, dim))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self.bias[:, None], x, self.weight[:, None])


class GroupedTransformerBlock(nn.Module):
    """Attend, then transform each token, with weights of its own for each group: (G, B, M, D) -> (G, B, M, D).

    ``x + out_proj(attention(in_proj(norm1(x))))``, then ``x + fc2(gelu(fc1(norm2(x))))``.

    Args:
        groups: number of groups G.
        dim: token width D.
        num_heads: attention heads; they divide D.
        dropout: of the MLP's hidden layer and of its output.

    Raises:
        ShapeError: D is no multiple of the number of heads.

    Source: Vaswani et al., Attention Is All You Need, section 3.2, in the pre-norm order.
    """

    def __init__(self, groups: int, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ShapeError(f"GroupedTransformerBlock: dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1 = GroupedLayerNorm(groups, dim)
        self.in_proj = GroupedLinear(groups, dim, 3 * dim)
        self.out_proj = GroupedLinear(groups, dim, dim)
        self.norm2 = GroupedLayerNorm(groups, dim)
        self.fc1 = GroupedLinear(groups, dim, MLP_RATIO * dim)
        self.fc2 = GroupedLinear(groups, MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)  # (G, B M, D): to the linear layers all tokens of a group are alike
        attended = rearrange(memory_efficient_attention(*self._qkv(x)), "(g b) m h d -> g (b m) (h d)", g=x.shape[0])
        tokens = tokens + self.out_proj(attended)
        hidden = F.dropout(F.gelu(self.fc1(self.norm2(tokens))), self.dropout, self.training)
        out: Tensor = (tokens + F.dropout(self.fc2(hidden), self.dropout, self.training)).view_as(x)
        return out

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights of tokens (G, B, M, D), averaged over heads: (G, B, M, M)."""
        q, k, _ = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in self._qkv(x))
        logits = torch.einsum("bmhd,bnhd->bhmn", q, k) / math.sqrt(q.shape[-1])
        weights: Tensor = logits.softmax(-1).mean(1).unflatten(0, x.shape[:2])
        return weights

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (G B, M, h, d): groups are samples to the attention itself."""
        packed = self.in_proj(self.norm1(x.flatten(1, 2)))
        pattern = "g (b m) (three h d) -> three (g b) m h d"
        parts: tuple[Tensor, ...] = rearrange(packed, pattern, three=3, h=self.num_heads, m=x.shape[2]).unbind(0)
        return parts

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}"


class EcgDualAttention(nn.Module):
    """Attend within each lead over time and, beside that, over the leads; the sum of both: (B, C, L, M) -> the same.

    The temporal branch sees L sequences of M tokens of width C, each lead with weights of its own. The lead branch sees
    L tokens of width C M. Both add sinusoidal positions first.

    Args:
        dim: channels C.
        instants: length M in time.
        leads: number of leads L.
        num_heads: attention heads of both branches; they divide C.
        dropout: of the positioned tokens and within the MLPs.
        batchwise: drop the same positioned tokens' entries in all samples of a batch, as the published code does.

    Raises:
        ShapeError: C is no multiple of the number of heads.

    Source: the dual attention of the published ECG autoencoder that TAFF-UNet builds on.
    """

    def __init__(
        self,
        dim: int,
        instants: int,
        leads: int = 12,
        num_heads: int = 8,
        dropout: float = 0.2,
        batchwise: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.instants, self.leads = dim, instants, leads
        self.dropout, self.batchwise = dropout, batchwise
        self.temporal = GroupedTransformerBlock(leads, dim, num_heads, dropout)
        self.lead = GroupedTransformerBlock(1, dim * instants, num_heads, dropout)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the constructor did."""
        for module in self.modules():
            if isinstance(module, GroupedLinear | GroupedLayerNorm):
                module.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        over_time = rearrange(self.temporal(self._drop(self._instant_tokens(x))), "l b m c -> b c l m")
        over_leads = self.lead(self._drop(self._lead_tokens(x)))
        out: Tensor = over_time + rearrange(over_leads, "1 b l (c m) -> b c l m", m=self.instants)
        return out

    def weights(self, x: Tensor) -> EcgAttention:
        """Return the attention weights that features (B, C, L, M) get, without dropout."""
        self._check(x)
        temporal = self.temporal.weights(self._instant_tokens(x))
        return EcgAttention(self.lead.weights(self._lead_tokens(x))[0], rearrange(temporal, "l b m n -> b l m n"))

    def _instant_tokens(self, x: Tensor) -> Tensor:
        tokens = rearrange(x, "b c l m -> l b m c")
        return tokens + sinusoidal_positions(self.instants, self.dim, like=tokens)

    def _lead_tokens(self, x: Tensor) -> Tensor:
        tokens = rearrange(x, "b c l m -> 1 b l (c m)")
        return tokens + sinusoidal_positions(self.leads, self.dim * self.instants, like=tokens)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1:] != (self.dim, self.leads, self.instants):
            wanted = f"(B, {self.dim}, {self.leads}, {self.instants})"
            raise ShapeError(f"EcgDualAttention: expected features {wanted}, got {tuple(x.shape)}")

    def _drop(self, tokens: Tensor) -> Tensor:
        """Drop entries of tokens (G, B, M, D)."""
        if not self.batchwise:
            return F.dropout(tokens, self.dropout, self.training)
        return tokens * F.dropout(torch.ones_like(tokens[:, :1]), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, instants={self.instants}, leads={self.leads}, batchwise={self.batchwise}"


def sinusoidal_positions(count: int, dim: int, *, like: Tensor) -> Tensor:
    """Return the table (count, dim) of sines (even columns) and cosines (odd ones) of the positions 0 to count - 1.

    It is computed in float32, then given the type and the device of ``like``.

    Source: Vaswani et al., Attention Is All You Need, section 3.5.
    """
    column = torch.arange(0, dim, 2, dtype=torch.float32, device=like.device)
    rate = torch.exp(column * (-math.log(WAVELENGTHS) / dim))
    angle = torch.arange(count, dtype=torch.float32, device=like.device)[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :dim].to(like.dtype)
