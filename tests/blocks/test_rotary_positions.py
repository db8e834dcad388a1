"""Axial rotary positions: angles by their definition, what is turned and what is not, float32 whatever the type."""

from __future__ import annotations

import math

import pytest
import torch

from trifuse.blocks import MemoryEfficientAttention, TransformerBlock
from trifuse.blocks.rotary_positions import axial_positions
from trifuse.kernels import ShapeError


def turned(x, prefix, grid, base=100.0):
    """The definition, patch by patch and pair by pair: a plane of channels is turned by an angle."""
    result = x.clone()
    head_dim = x.shape[-1]
    for row in range(grid[0]):
        for column in range(grid[1]):
            token = prefix + row * grid[1] + column
            middles = [2 * (place + 0.5) / side - 1 for place, side in zip((row, column), grid, strict=True)]
            for pair in range(head_dim // 2):
                axis, k = divmod(pair, head_dim // 4)
                angle = 2 * math.pi * middles[axis] * base ** (-4 * k / head_dim)
                one, other = x[:, token, :, pair], x[:, token, :, pair + head_dim // 2]
                result[:, token, :, pair] = one * math.cos(angle) - other * math.sin(angle)
                result[:, token, :, pair + head_dim // 2] = other * math.cos(angle) + one * math.sin(angle)
    return result


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize(("grid", "head_dim"), [((2, 3), 8), ((1, 1), 4), ((5, 1), 12)])
def test_patches_are_turned_by_their_place_and_nothing_else(prefix, grid, head_dim):
    x = torch.randn(2, prefix + grid[0] * grid[1], 3, head_dim, generator=torch.Generator().manual_seed(0)).double()
    got = axial_positions(grid, head_dim).rotate(x)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, turned(x, prefix, grid), atol=1e-5, rtol=1e-5)  # angles are float32
    assert torch.equal(got[:, :prefix], x[:, :prefix])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_turned_in_float32(dtype):
    x = torch.randn(2, 9, 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = axial_positions((3, 3), 16)
    assert positions.cos.dtype == torch.float32
    assert torch.equal(positions.rotate(x), positions.rotate(x.float()).to(dtype))


def test_lengths_are_kept_and_distances_alone_count():
    """Scores depend on how far two patches lie apart: moving both by a row changes nothing."""
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = axial_positions((4, 4), 8)
    grid = [positions.rotate(x.expand(1, 16, 1, 8)) for x in (q, k)]
    torch.testing.assert_close(grid[0].norm(dim=-1), q.norm().expand(1, 16, 1), atol=1e-6, rtol=1e-6)
    scores = (grid[0][0, :, 0] @ grid[1][0, :, 0].T).view(4, 4, 4, 4)
    torch.testing.assert_close(scores[0, 1, 2, 3], scores[1, 1, 3, 3], atol=1e-6, rtol=1e-6)
    assert (scores[0, 1, 2, 3] - scores[0, 1, 3, 3]).abs() > 1e-3


def test_attention_and_block_hand_positions_on():
    x, positions = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0)), axial_positions((2, 2), 8)
    attention, block = MemoryEfficientAttention(16, 2), TransformerBlock(16, 2, qkv_bias=False, eps=1e-5)
    assert block.attn.qkv.bias is None
    assert block.norm1.eps == block.norm2.eps == 1e-5
    for module in (attention, block):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
            assert (module(x, positions) - module(x)).abs().max() > 1e-3
    q, k, v = (part.unflatten(-1, (2, 8)) for part in attention.qkv(x).chunk(3, dim=-1))
    scores = torch.einsum("bqhd,bkhd->bhqk", positions.rotate(q), positions.rotate(k)) / 8**0.5
    expected = attention.proj(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))
    torch.testing.assert_close(attention(x, positions), expected)


def test_a_head_of_another_width_is_refused():
    with pytest.raises(ShapeError, match="expected a head_dim divisible by 4, got 6"):
        axial_positions((2, 2), 6)
