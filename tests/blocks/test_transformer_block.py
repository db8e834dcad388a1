"""The transformer block: each part against its formula, and the published names."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trifuse.blocks.transformer_block import LayerScale, Mlp, SwiGLU, TransformerBlock, iterate_blocks
from trifuse.kernels import backend
from trifuse.kernels.testing import launches

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomised(module, seed=3):
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.double()


def tokens(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed), requires_grad=True)


def test_layer_scale_weighs_the_branch():
    scale = randomised(LayerScale(5))
    residual, branch = tokens(2, 3, 5), tokens(2, 3, 5, seed=1)
    torch.testing.assert_close(scale(residual, branch), residual + scale.gamma * branch)
    assert torch.equal(LayerScale(4, init_values=0.25).gamma, torch.full((4,), 0.25))


def test_mlp_uses_the_exact_gelu():
    mlp, x = randomised(Mlp(4, 7)), tokens(2, 3, 4)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_swiglu_gates_with_the_first_half():
    ffn, x = randomised(SwiGLU(4, 8)), tokens(2, 3, 4)
    widened = x @ ffn.w12.weight.T + ffn.w12.bias
    gate, value = widened[..., :8], widened[..., 8:]
    torch.testing.assert_close(ffn(x), (gate * torch.sigmoid(gate) * value) @ ffn.w3.weight.T + ffn.w3.bias)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_block_is_its_formula_and_its_gradients_too(ffn):
    block, x = randomised(TransformerBlock(12, 3, ffn=ffn)), tokens(2, 5, 12)

    def norm(y, layer):
        return F.layer_norm(y, (12,), layer.weight, layer.bias, eps=1e-6)

    y = x + block.ls1.gamma * block.attn(norm(x, block.norm1))
    y = y + block.ls2.gamma * block.mlp(norm(y, block.norm2))
    out = block(x)
    torch.testing.assert_close(out, y)
    names, parameters = zip(*block.named_parameters(), strict=True)
    got = torch.autograd.grad(out.square().sum(), [x, *parameters])
    wanted = torch.autograd.grad(y.square().sum(), [x, *parameters])
    for name, ours, theirs in zip(["x", *names], got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_parameter_names_are_those_of_published_weights():
    common = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
    common += ["ls1.gamma", "norm2.weight", "norm2.bias"]
    for ffn, names in (("mlp", ("fc1", "fc2")), ("swiglu", ("w12", "w3"))):
        ffn_names = [f"mlp.{name}.{kind}" for name in names for kind in ("weight", "bias")]
        assert [name for name, _ in TransformerBlock(12, 3, ffn=ffn).named_parameters()] == [
            *common,
            *ffn_names,
            "ls2.gamma",
        ]


@pytest.mark.parametrize(("dim", "ratio", "hidden"), [(1536, 4.0, 4096), (40, 4.0, 112), (24, 4.0, 64), (20, 2.0, 32)])
def test_swiglu_width_is_two_thirds_rounded_up_to_eight(dim, ratio, hidden):
    with torch.device("meta"):
        block = TransformerBlock(dim, 2, mlp_ratio=ratio, ffn="swiglu")
    assert tuple(block.mlp.w12.weight.shape) == (2 * hidden, dim)
    assert tuple(block.mlp.w3.weight.shape) == (dim, hidden)


def test_mlp_width_follows_the_ratio():
    assert TransformerBlock(12, 3, mlp_ratio=2.5).mlp.fc1.out_features == 30


def test_starts_near_the_identity():
    """Small weights, LayerScale 1: a fresh block changes its tokens little."""
    block = TransformerBlock(64, 2)
    x = torch.randn(2, 9, 64, generator=seeded())
    assert torch.equal(block.ls1.gamma, torch.ones(64))
    assert ((block(x) - x).norm() / x.norm()).item() < 0.2
    assert torch.equal(TransformerBlock(64, 2, init_values=0.0)(x), x)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_reset_draws_everything_anew(ffn):
    block, again = randomised(TransformerBlock(12, 3, ffn=ffn)), TransformerBlock(12, 3, ffn=ffn).double()
    for one in (block, again):
        one.reset_parameters(seeded(5))
    for (name, ours), theirs in zip(block.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_unknown_feed_forward_is_refused():
    with pytest.raises(ValueError, match="expected ffn 'mlp' or 'swiglu', got 'relu'"):
        TransformerBlock(12, 3, ffn="relu")


def test_b14_copies_and_compiles():
    block, x = TransformerBlock(12, 3), torch.randn(1, 5, 12, generator=seeded())
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


# --------------------------------------------------------------------------------------------------- blocks in a row


def row_of_blocks(count=3):
    return [randomised(TransformerBlock(12, 3), seed).float() for seed in range(count)]


def called(blocks, x):
    results = []
    for block in blocks:
        x = block(x)
        results.append(x)
    return results


def test_blocks_in_a_row_give_what_each_gives_called_on_the_last():
    blocks, x = row_of_blocks(), tokens(2, 5, 12).float()
    found, expected = list(iterate_blocks(blocks, x)), called(blocks, x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert list(iterate_blocks([], x)) == []


@interpreted
def test_blocks_in_a_row_add_and_normalise_in_one_launch(monkeypatch):
    """A norm before the first block, and one in the middle and at the end of each; behind the last a sum alone."""
    blocks, x, written, alone = row_of_blocks(), tokens(2, 5, 12).float(), LayerScale.forward, []
    monkeypatch.setattr(LayerScale, "forward", lambda scale, *terms: alone.append(scale) or written(scale, *terms))
    with torch.no_grad(), backend("triton", strict=False), launches() as counted:
        found = list(iterate_blocks(blocks, x))
    assert counted.kernels == {"_residual_layer_norm_fwd_kernel": 2 * len(blocks)}
    assert alone == [blocks[-1].ls2]
    torch.testing.assert_close(found, called(blocks, x), rtol=1e-5, atol=1e-4)


def doubled(module, given, result):
    return 2 * result


def hooked(blocks):
    blocks[1].register_forward_hook(doubled)


def hooked_before(blocks):
    blocks[1].register_forward_pre_hook(lambda block, given: (2 * given[0],))


def forward_of_its_own(blocks):
    written = blocks[1].forward
    blocks[1].forward = lambda x: 2 * written(x)


def another_block(blocks):
    blocks[1] = nn.Sequential(blocks[1], nn.Linear(12, 12))


def another_class(blocks):
    class Doubled(TransformerBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    blocks[1].__class__ = Doubled


def another_norm(blocks):
    blocks[1].norm1 = nn.Sequential(blocks[1].norm1, nn.Linear(12, 12))


def hooked_parts(blocks):
    for name in ("norm1", "attn", "ls1", "norm2", "mlp", "ls2"):
        getattr(blocks[1], name).register_forward_hook(doubled)


CHANGES = [hooked, hooked_before, forward_of_its_own, another_block, another_class, another_norm, hooked_parts]


@pytest.mark.parametrize("change", CHANGES)
def test_b16_what_is_done_to_a_block_in_a_row_acts(change):
    blocks, x = row_of_blocks(), tokens(2, 5, 12).float()
    before = called(blocks, x)
    change(blocks)
    found, expected = list(iterate_blocks(blocks, x)), called(blocks, x)
    assert torch.equal(found[0], before[0])
    assert not torch.allclose(found[1], before[1])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", ["norm1", "norm2"])
def test_b16_a_norm_over_tokens_and_channels_acts(norm, affine):
    block, x = randomised(TransformerBlock(8, 2)), tokens(2, 3, 8)
    over_both = randomised(nn.LayerNorm((3, 8), elementwise_affine=affine))
    setattr(block, norm, over_both)
    attended = block.ls1(x, block.attn(block.norm1(x)))
    torch.testing.assert_close(block(x), block.ls2(attended, block.mlp(block.norm2(attended))))


def test_b16_one_factor_for_all_channels_acts():
    block, x = randomised(TransformerBlock(8, 2)), tokens(2, 3, 8)
    block.ls1.gamma = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    attended = x + 0.5 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), block.ls2(attended, block.mlp(block.norm2(attended))))


def test_a_norm_of_other_channels_is_refused():
    block = randomised(TransformerBlock(8, 2))
    block.norm2 = nn.LayerNorm(4, elementwise_affine=False)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        block(tokens(2, 3, 8))
