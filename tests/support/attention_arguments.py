"""Arguments of attention, and how a call on them is compared with the reference."""

from __future__ import annotations

import torch

from trifuse.kernels.ops.memory_efficient_attention import (
    memory_efficient_attention,
    memory_efficient_attention_reference,
)
from trifuse.kernels.testing import assert_op_matches


def random_arguments(b, m_q, m_k, h, d, dtype=torch.float32, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, m_q, h, d), (b, m_k, h, d), (b, m_k, h, d))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(requires_grad) for s in shapes]


def random_bias(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def check(*arguments, **options):
    assert_op_matches(memory_efficient_attention, memory_efficient_attention_reference, *arguments, **options)
