"""The transformer block: each part against its formula, and the published names."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from trifuse.blocks.transformer_block import LayerScale, Mlp, SwiGLU, TransformerBlock


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomised(module):
    generator = seeded(3)
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
