"""The two attentions of the ECG autoencoder, against PyTorch's own attention module and a loop over the leads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.blocks.ecg_attention import EcgDualAttention, GroupedLinear, GroupedTransformerBlock, sinusoidal_positions
from trifuse.kernels import ShapeError


def randomised(module: nn.Module) -> nn.Module:
    """Give every parameter values of its own, norms and biases too, so that none could be forgotten or exchanged."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
    return module.double().eval()


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def block_by_the_book(block: GroupedTransformerBlock, group: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """One group's block with PyTorch's attention module: tokens (B, M, D) -> tokens, weights (B, M, M)."""
    dim = x.shape[-1]
    attention = nn.MultiheadAttention(dim, block.num_heads, batch_first=True).double()
    state = {
        "in_proj_weight": block.in_proj.weight[group],
        "in_proj_bias": block.in_proj.bias[group],
        "out_proj.weight": block.out_proj.weight[group],
        "out_proj.bias": block.out_proj.bias[group],
    }
    attention.load_state_dict(state)
    norm1, norm2 = (
        lambda t, norm=norm: F.layer_norm(t, (dim,), norm.weight[group], norm.bias[group], 1e-5)
        for norm in (block.norm1, block.norm2)
    )
    y = norm1(x)
    attended, weights = attention(y, y, y)
    x = x + attended
    hidden = F.gelu(F.linear(norm2(x), block.fc1.weight[group], block.fc1.bias[group]))
    return x + F.linear(hidden, block.fc2.weight[group], block.fc2.bias[group]), weights


@pytest.mark.parametrize(
    ("groups", "batch", "tokens", "dim", "heads"), [(12, 2, 5, 16, 8), (1, 3, 12, 8, 2), (3, 1, 1, 4, 1)]
)
def test_all_groups_at_once_equal_a_loop(groups, batch, tokens, dim, heads):
    block = randomised(GroupedTransformerBlock(groups, dim, heads))
    x = features(groups, batch, tokens, dim).requires_grad_(True)
    out, weights = block(x), block.weights(x)
    loop = [block_by_the_book(block, group, x[group]) for group in range(groups)]
    torch.testing.assert_close(out, torch.stack([part for part, _ in loop]))
    torch.testing.assert_close(weights, torch.stack([part for _, part in loop]))
    gradient = features(*out.shape, seed=1)
    ours = torch.autograd.grad(out, [x, *block.parameters()], gradient)
    others = torch.autograd.grad(torch.stack([p for p, _ in loop]), [x, block.norm1.weight, block.fc2.bias], gradient)
    names = ["x", *(name for name, _ in block.named_parameters())]
    found = dict(zip(names, ours, strict=True))
    for name, other in zip(("x", "norm1.weight", "fc2.bias"), others, strict=True):
        torch.testing.assert_close(found[name], other)
    bias = found["in_proj.bias"].clone()
    assert bias[:, dim : 2 * dim].abs().max() < 1e-9  # a key's bias adds the same to all scores of a query
    assert all(gradient.abs().amax() > 0 for name, gradient in found.items() if tokens > 1)


def test_leads_do_not_share_weights():
    """The same tokens in every lead leave each lead's block differently, and a lead's weights move its row alone."""
    attention = randomised(EcgDualAttention(8, 3, leads=4))
    tokens = features(1, 2, 3, 8).expand(4, 2, 3, 8)
    before = attention.temporal(tokens)
    assert all(not torch.allclose(before[0], before[lead]) for lead in (1, 2, 3))
    with torch.no_grad():
        attention.temporal.fc1.weight[2] += 1.0
    changed = (attention.temporal(tokens) - before).abs().amax((1, 2, 3))
    assert (changed > 0).tolist() == [False, False, True, False]


@torch.no_grad()
def test_sum_of_both_branches():
    attention, x = randomised(EcgDualAttention(8, 3, leads=4)), features(2, 8, 4, 3)
    expected = torch.zeros_like(x)
    weights = attention.weights(x)
    for lead in range(4):
        tokens = x[:, :, lead].transpose(1, 2) + sinusoidal_positions(3, 8, like=x)
        out, map_ = block_by_the_book(attention.temporal, lead, tokens)
        expected[:, :, lead] += out.transpose(1, 2)
        torch.testing.assert_close(weights.temporal[:, lead], map_)
    tokens = x.transpose(1, 2).reshape(2, 4, 24) + sinusoidal_positions(4, 24, like=x)
    out, map_ = block_by_the_book(attention.lead, 0, tokens)
    expected += out.view(2, 4, 8, 3).transpose(1, 2)
    torch.testing.assert_close(attention(x), expected)
    torch.testing.assert_close(weights.lead, map_)


def test_positions_by_their_definition():
    table = sinusoidal_positions(5, 6, like=torch.zeros((), dtype=torch.float64))
    for position in range(5):
        for column in range(6):
            angle = position / 10_000 ** (2 * (column // 2) / 6)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-6)
    assert table.dtype == torch.float64
    assert sinusoidal_positions(2, 5, like=table).shape == (2, 5)


def test_dropout_draws_for_each_sample_or_for_the_batch():
    tokens = torch.ones(1, 6, 4, 8)
    for batchwise in (False, True):
        attention = EcgDualAttention(8, 4, leads=1, dropout=0.5, batchwise=batchwise).train()
        dropped = attention._drop(tokens)
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
        assert all(torch.equal(dropped[:, 0], dropped[:, sample]) for sample in range(6)) is batchwise
        assert torch.equal(attention.eval()._drop(tokens), tokens)


def test_the_mlp_drops_in_training_alone():
    block = GroupedTransformerBlock(2, 8, 2, dropout=0.5)
    x = torch.randn(2, 3, 4, 8)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_first_weights():
    a, b, c = (EcgDualAttention(8, 2) for _ in range(3))
    for module, seed in ((a, 0), (b, 0), (c, 1)):
        module.reset_parameters(torch.Generator().manual_seed(seed))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lead.fc1.weight, c.lead.fc1.weight)
    weight = GroupedLinear(3, 25, 100).weight
    assert 0.19 < weight.abs().max() <= 0.2  # 1 / sqrt(25)


def test_refusals():
    with pytest.raises(ShapeError, match="dim 12 is not a multiple of num_heads 8"):
        EcgDualAttention(12, 4)
    attention = EcgDualAttention(8, 4)
    for method in (attention, attention.weights):
        with pytest.raises(ShapeError, match=r"expected features \(B, 8, 12, 4\), got \(2, 8, 4, 12\)"):
            method(torch.zeros(2, 8, 4, 12))
