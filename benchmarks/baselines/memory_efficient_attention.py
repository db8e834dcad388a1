"""What attention is compared with: attention as defined, PyTorch's own fused attention, and xformers'."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def attention_by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the whole score matrix in memory; tensors (B, M, h, d)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2)


def attention_by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with PyTorch's own fused attention; tensors (B, M, h, d)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with xformers' fused attention; tensors (B, M, h, d)."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def xformers_obstacle() -> str:
    """Return why xformers cannot attend here, found by a call on tiny tensors; empty if it can."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if not torch.cuda.is_available():
        return "xformers has no kernels for a CPU"
    q = torch.zeros(1, 16, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    try:
        attention_by_xformers(q, q, q).sum().backward()
    except Exception as error:  # whatever a foreign extension raises is an answer
        return f"xformers cannot attend here: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    return ""


compiled_attention_by_definition = torch.compile(attention_by_definition, dynamic=False)
