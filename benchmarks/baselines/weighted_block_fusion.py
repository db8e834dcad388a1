"""What weighted block fusion is compared with: a stack and a contraction, a running sum, and Liger-Kernel's sum."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor


def stack_einsum(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Fuse N maps by stacking them and contracting: the usual way."""
    return torch.einsum("n,nbmd->bmd", torch.softmax(logits, 0).to(features[0].dtype), torch.stack(tuple(features)))


def running_sum(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Fuse N maps one after the other: no stack, but the sum is written and read N times."""
    weights = torch.softmax(logits, 0).to(features[0].dtype)
    fused = weights[0] * features[0]
    for weight, feature in zip(weights[1:], features[1:], strict=True):
        fused = fused + weight * feature
    return fused


compiled_running_sum = torch.compile(running_sum, dynamic=False)


def liger_attention_residuals(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Fuse N maps with equal weights by Liger-Kernel's attention residuals, the nearest public Triton kernel.

    There a learned query gives every token its own weights; a query of zeros makes them equal, so that its result and
    the maps' gradients are those of weighted block fusion with equal logits. It takes the maps stacked.
    """
    from liger_kernel.ops.attn_res import LigerAttnResFunction

    width = features[0].shape[-1]
    query = torch.zeros(width, dtype=features[0].dtype, device=features[0].device)
    return LigerAttnResFunction.apply(torch.stack(tuple(features)), query, torch.ones_like(query), 1e-6)


LIGER_MISSING = "" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
