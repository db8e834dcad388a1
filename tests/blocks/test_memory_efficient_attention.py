"""The attention block: its layout of weights, its values, and how it starts."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from trifuse.blocks.memory_efficient_attention import MemoryEfficientAttention
from trifuse.kernels import ShapeError, backend


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_block(dim=12, num_heads=3, **options):
    block = MemoryEfficientAttention(dim, num_heads, **options)
    block.reset_parameters(seeded())
    return block


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_matches_torch_multi_head_attention(qkv_bias):
    """An independent oracle with the same weight layout: rows q, then k, then v, heads in order within each."""
    block = random_block(qkv_bias=qkv_bias).double()
    oracle = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(1)))
        oracle.in_proj_weight.copy_(block.qkv.weight)
        oracle.in_proj_bias.copy_(block.qkv.bias) if qkv_bias else oracle.in_proj_bias.zero_()
        oracle.out_proj.load_state_dict(block.proj.state_dict())
    x = torch.randn(2, 7, 12, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    expected, _ = oracle(x, x, x)
    torch.testing.assert_close(block(x), expected)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (block(x), expected)]
    torch.testing.assert_close(*grads)


def test_parameter_names_are_those_of_published_weights():
    shapes = {name: tuple(parameter.shape) for name, parameter in random_block().named_parameters()}
    assert shapes == {"qkv.weight": (36, 12), "qkv.bias": (36,), "proj.weight": (12, 12), "proj.bias": (12,)}
    assert [name for name, _ in random_block(qkv_bias=False).named_parameters()] == [
        "qkv.weight",
        "proj.weight",
        "proj.bias",
    ]


def test_starts_small_and_repeatably():
    block, again, other = random_block(96, 2), random_block(96, 2), MemoryEfficientAttention(96, 2)
    other.reset_parameters(seeded(1))
    assert torch.equal(block.qkv.weight, again.qkv.weight)
    assert not torch.equal(block.qkv.weight, other.qkv.weight)
    assert block.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.qkv.bias.any()
    assert not block.proj.bias.any()


@pytest.mark.parametrize("num_heads", [5, 0, -3, 24])
def test_b8_heads_must_divide_the_width(num_heads):
    with pytest.raises(ShapeError, match=rf"dim 12 is not a multiple of num_heads {num_heads}"):
        MemoryEfficientAttention(12, num_heads)


def test_every_parameter_gets_a_gradient():
    block = random_block()
    block(torch.randn(2, 5, 12, generator=seeded())).square().sum().backward()
    assert {name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()} == set()


def test_b13_backends_share_one_state():
    block, x = random_block(), torch.randn(1, 5, 12, generator=seeded())
    with backend("reference"):
        expected = block(x)
    torch.testing.assert_close(block(x), expected)


def test_b14_copies_pickles_and_compiles():
    block, x = random_block(), torch.randn(1, 5, 12, generator=seeded())
    stream = io.BytesIO()
    torch.save(block, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(block), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x), block(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_k25_autocast():
    block, x = random_block(), torch.randn(1, 5, 12, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), block(x), atol=2e-2, rtol=2e-2)
