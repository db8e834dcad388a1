"""The mixing-attention decoder block: its equations, one self-attention for two uses, draws, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.blocks import MixingAttention
from trifuse.blocks import memory_efficient_attention as attention_file
from trifuse.kernels import ShapeError


def tensors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_of(dim: int = 12, num_heads: int = 2, in_dim: int | None = 20, **options) -> MixingAttention:
    """A block whose norms and biases are not what they start as, so that none could be left out unseen."""
    block = MixingAttention(dim, num_heads, in_dim, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in block.state_dict().items():
            if tensor.is_floating_point() and ("norm" in name or name.endswith("bias")):
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator).to(tensor.dtype))
    return block


def unit(x: Tensor, conv_norm_relu: torch.nn.Module) -> Tensor:
    """Convolve, normalise by the running statistics, rectify."""
    x = F.conv2d(x, conv_norm_relu.conv.weight, padding=1)
    norm = conv_norm_relu.norm
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()


def published(block: MixingAttention, x: Tensor, skip: Tensor) -> Tensor:
    """Eqs. 7-10 in evaluation, from plain operations: attention by its score matrix, the gate by its mean."""
    if block.join.up is not None:
        x = unit(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), block.join.up)
    joined = unit(torch.cat([x, skip], dim=1), block.join.conv)
    B, C, H, W = joined.shape
    source = joined
    if block.pos is not None:
        source = joined + F.conv2d(joined, block.pos.weight, block.pos.bias, padding=1, groups=C)
    tokens = F.layer_norm(source.permute(0, 2, 3, 1), (C,), block.norm.weight, block.norm.bias, eps=1e-6)
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(tokens.reshape(B, H * W, C)).reshape(B, H * W, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * (C // heads) ** -0.5).softmax(-1)
    attended = block.attn.proj((weights @ v).transpose(1, 2).reshape(B, H * W, C)).transpose(1, 2).reshape(B, C, H, W)
    mixed = attended + joined
    hidden = F.conv2d(mixed.mean((2, 3), keepdim=True), block.mca.squeeze.weight, block.mca.squeeze.bias).relu()
    gate = torch.sigmoid(F.conv2d(hidden, block.mca.excite.weight, block.mca.excite.bias))
    return unit(gate * mixed + attended, block.out)


@pytest.mark.parametrize("pos", ["none", "dwconv"])
@pytest.mark.parametrize(
    ("in_dim", "size", "skip_size"), [(None, (5, 7), (5, 7)), (20, (3, 4), (6, 8)), (20, (1, 1), (2, 2))]
)
def test_equations(in_dim, size, skip_size, pos):
    block = block_of(in_dim=in_dim, pos=pos).double().eval()
    x, skip = tensors(2, in_dim or 12, *size).double(), tensors(2, 12, *skip_size, seed=1).double()
    torch.testing.assert_close(block(x, skip), published(block, x, skip), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("dim", "num_heads"), [(576, 8), (288, 6), (144, 4), (72, 2)])
def test_head_dims_of_the_paper(dim, num_heads):
    block = MixingAttention(dim, num_heads).eval()
    x = tensors(1, dim, 2, 3)
    torch.testing.assert_close(block(x, x), published(block, x, x), atol=1e-4, rtol=1e-4)


def test_self_attention_is_evaluated_once(monkeypatch):
    """Its result enters twice, as the residual of P2 and of P: a second evaluation would double the cost."""
    calls = []
    attend = attention_file.memory_efficient_attention
    monkeypatch.setattr(
        attention_file, "memory_efficient_attention", lambda *args, **kw: calls.append(1) or attend(*args, **kw)
    )
    block = block_of()
    modules = []
    block.attn.register_forward_hook(lambda *_: modules.append(1))
    for mode in (True, False):
        block.train(mode)
        block(tensors(2, 20, 2, 2), tensors(2, 12, 4, 4))
    assert (len(calls), len(modules)) == (2, 2)


def test_evaluation_is_deterministic_and_keeps_samples_apart():
    block = block_of().eval()
    x, skip = tensors(3, 20, 3, 3), tensors(3, 12, 6, 6)
    whole = block(x, skip)
    assert torch.equal(block(x, skip), whole)
    assert torch.equal(block(x, skip, torch.Generator().manual_seed(5)), whole)
    torch.testing.assert_close(torch.cat([block(x[i : i + 1], skip[i : i + 1]) for i in range(3)]), whole)


def test_training_draws_from_the_generator():
    block = block_of(dropout=0.0)
    x, skip = tensors(2, 20, 3, 3), tensors(2, 12, 6, 6)
    first, again = (block(x, skip, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    others = [block(x, skip, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert any(not torch.equal(first, other) for other in others)


def test_dropout_of_the_joined_map_only_in_training():
    block = block_of(dropout=0.9)
    assert (block.dropout.p, MixingAttention(8, 2).dropout.p) == (0.9, 0.1)
    seen = []
    block.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x, skip = tensors(2, 20, 4, 4), tensors(2, 12, 8, 8)
    block(x, skip)
    block.eval()(x, skip)
    zeros = [float((tokens == 0).float().mean()) for tokens in seen]
    assert zeros[0] > 0.85 > 0.75 > zeros[1]


@pytest.mark.parametrize("options", [{}, {"pos": "dwconv"}, {"norm": "group"}, {"draw": "sample"}, {"in_dim": None}])
def test_gradients_reach_everything(options):
    block = block_of(**options)
    in_dim = options.get("in_dim", 20)
    side = 4 if in_dim else 8
    x = tensors(2, in_dim or 12, side, side).requires_grad_(True)
    skip = tensors(2, 12, 8, 8).requires_grad_(True)
    block(x, skip).square().sum().backward()
    named = {**dict(block.named_parameters()), "x": x, "skip": skip}
    assert [name for name, tensor in named.items() if tensor.grad is None or not bool(tensor.grad.any())] == []


def test_weights_follow_the_generator():
    states = [MixingAttention(8, 2, pos="dwconv").state_dict() for _ in range(2)]
    assert not torch.equal(states[0]["attn.qkv.weight"], states[1]["attn.qkv.weight"])
    drawn = []
    for _ in range(2):
        block = MixingAttention(8, 2, pos="dwconv")
        block.reset_parameters(torch.Generator().manual_seed(0))
        drawn.append(block.state_dict())
    assert [name for name in drawn[0] if not torch.equal(drawn[0][name], drawn[1][name])] == []
    assert abs(float(MixingAttention(96, 2).attn.qkv.weight.detach().std()) - 0.02) < 2e-3


@pytest.mark.parametrize(
    ("x", "skip"),
    [((1, 20, 3, 3), (1, 12, 6, 5)), ((1, 20, 3, 3), (1, 11, 6, 6)), ((1, 19, 3, 3), (1, 12, 6, 6))],
)
def test_b6_maps_that_do_not_fit_are_refused(x, skip):
    with pytest.raises(ShapeError, match=r"expected a map \(B, 20, H, W\) and a skip map \(B, 12, 2 H, 2 W\), got"):
        block_of()(tensors(*x), tensors(*skip))


def test_b6_the_first_block_takes_two_maps_of_one_size():
    with pytest.raises(ShapeError, match=r"expected a map \(B, 12, H, W\) and a skip map \(B, 12, 1 H, 1 W\), got"):
        block_of(in_dim=None)(tensors(1, 12, 3, 3), tensors(1, 12, 6, 6))
    with pytest.raises(ShapeError, match=r"got \(12, 3, 3\)"):
        block_of(in_dim=None)(tensors(12, 3, 3), tensors(1, 12, 3, 3))


def test_options_that_make_no_sense():
    with pytest.raises(ShapeError, match="dim 12 is not a multiple of num_heads 5"):
        MixingAttention(12, 5)
    with pytest.raises(ValueError, match=r"pos: expected one of 'none', 'dwconv', got 'sine'"):
        MixingAttention(12, 2, pos="sine")
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"expected dropout in \[0, 1\), got {dropout}"):
            MixingAttention(12, 2, dropout=dropout)
