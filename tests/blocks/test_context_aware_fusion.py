"""Context-aware fusion: the equations, every gradient, every option, and what it refuses."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from trifuse.blocks import ContextAwareFusion
from trifuse.kernels import ShapeError, backend

OPTIONS = [
    {},
    {"spatial_pool": "local3"},
    {"spatial_pool": "none"},
    {"max_pool": False},
    {"pre_conv": False},
    {"max_pool": False, "pre_conv": False},
    {"spatial_kernel": 3},
    {"channel_weights": "literal"},
    {"channel_weights": "literal", "max_pool": False, "pre_conv": False},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
SIZES = [(5, 4), (2, 2), (1, 1), (3, 1)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_block(dim=4, dtype=torch.float64, **options):
    """In evaluation, with weights and statistics that none has at its start."""
    block = ContextAwareFusion(dim, **options).to(dtype).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
        if block.norm is not None:
            block.norm.running_mean.normal_(std=0.3, generator=seeded(5))
            block.norm.running_var.uniform_(0.01, 0.1, generator=seeded(6))
    return block


def random_maps(dim=4, size=(5, 4), batch=2, dtype=torch.float64):
    return [torch.randn(batch, dim, *size, generator=seeded(i), dtype=dtype).requires_grad_() for i in (1, 2)]


def by_the_equations(block, f1, f2):
    """Equations 3 to 6, step by step, with PyTorch's own layers."""
    x = torch.cat([f1, f2], dim=1)
    u = block.pre(x) if block.pre is not None else x
    pooled = F.adaptive_avg_pool2d(u, 1)
    if block.max_pool:
        pooled = torch.cat([pooled, F.adaptive_max_pool2d(u, 1)], dim=1)
    if block.channel_weights == "normalised":
        mean, variance = (each[:, None, None] for each in (block.norm.running_mean, block.norm.running_var))
        pooled = (pooled - mean) / (variance + 1e-5).sqrt() / pooled.shape[1] ** 0.5
    fused = block.reduce(torch.sigmoid(block.channel(pooled)) * x)
    t = block.spatial_global(f1) + block.spatial_local(f2)
    if block.spatial_pool == "channel":
        t = t.mean(dim=1, keepdim=True)
    elif block.spatial_pool == "local3":
        neighbours = F.conv2d(F.pad(torch.ones_like(t[:1, :1]), (1, 1, 1, 1)), torch.ones(1, 1, 3, 3).to(t))
        t = F.avg_pool2d(F.pad(t, (1, 1, 1, 1)), 3, stride=1) * 9 / neighbours
    w = torch.sigmoid(t if block.spatial is None else block.spatial(t))
    return w * fused


@every_option
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_equations_with_every_gradient(options, size):
    block, maps = random_block(**options), random_maps(size=size)
    names = ["global_features", "local_features", *dict(block.named_parameters())]
    leaves = [*maps, *block.parameters()]
    expected = by_the_equations(block, *maps)
    cotangent = torch.randn(expected.shape, generator=seeded(3), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    for name in ("torch", "reference"):
        with backend(name):
            out = block(*maps)
            gradients = torch.autograd.grad(out, leaves, cotangent)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for parameter, got, want in zip(names, gradients, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=lambda m, p=parameter: f"{p}: {m}")


@given(data=st.data())
def test_property_any_size_batch_and_option(data):
    dim, batch = data.draw(st.integers(1, 6), label="dim"), data.draw(st.integers(1, 3), label="batch")
    size = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)), label="size")
    block = random_block(dim, **data.draw(st.sampled_from(OPTIONS), label="options"))
    maps = random_maps(dim, size, batch)
    torch.testing.assert_close(block(*maps), by_the_equations(block, *maps), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["normalised", "literal"])
def test_parameters_of_the_network(form):
    blocks = [ContextAwareFusion(dim, channel_weights=form) for dim in (72, 144, 288, 576)]
    assert sum(p.numel() for block in blocks for p in block.parameters()) == 7_052_600
    shapes = {name: tuple(p.shape) for name, p in ContextAwareFusion(4, channel_weights=form).named_parameters()}
    assert shapes == {
        "pre.weight": (8, 8, 1, 1),
        "channel.weight": (8, 16, 1, 1),
        "channel.bias": (8,),
        "reduce.weight": (4, 8, 1, 1),
        "spatial_global.weight": (4, 4, 1, 1),
        "spatial_local.weight": (4, 4, 1, 1),
        "spatial.weight": (1, 1, 7, 7),
        "spatial.bias": (1,),
    }


@every_option
def test_gates_have_their_shapes_and_start_near_one_half(options):
    block = ContextAwareFusion(16, **options)
    block.reset_parameters(seeded())
    maps = [1e-4 * x for x in random_maps(16, (6, 5), dtype=torch.float32)]
    channel, spatial = torch.sigmoid(block.channel_logits(*maps)), torch.sigmoid(block.spatial_logits(*maps))
    assert channel.shape == (2, 32)
    assert spatial.shape == (2, 1, 6, 5)
    for gate in (channel, spatial):
        torch.testing.assert_close(gate, torch.full_like(gate, 0.5), atol=2e-3, rtol=0)
    loud = [1e4 * x for x in maps]
    nn.init.normal_(block.channel.weight, generator=seeded(1))  # which may have started at zero
    for gate in (torch.sigmoid(block.channel_logits(*loud)), torch.sigmoid(block.spatial_logits(*loud))):
        assert 0 <= gate.min() < gate.max() <= 1


def features(dim=24, size=(16, 16), batch=4):
    """Maps as an encoder gives them: one normalised over its channels, one rectified."""
    f1, f2 = random_maps(dim, size, batch, torch.float32)
    return F.layer_norm(f1.detach().movedim(1, -1), (dim,)).movedim(-1, 1), f2.detach().relu()


def share_at_the_ends(logits):
    weights = torch.sigmoid(logits)
    return ((weights < 0.05) | (weights > 0.95)).float().mean().item()


def test_normalised_channel_weights_start_at_one_half_and_literal_ones_at_the_ends():
    """On maps of the size that they have in a network; the weights of positions are unsaturated in either form."""
    maps, started = features(), {}
    for form in ("normalised", "literal"):
        block = started[form] = ContextAwareFusion(24, channel_weights=form)
        block.reset_parameters(seeded())
        assert share_at_the_ends(block.spatial_logits(*maps)) < 0.01
    assert torch.equal(started["normalised"].channel_logits(*maps), torch.zeros(4, 48))
    assert share_at_the_ends(started["literal"].channel_logits(*maps)) > 0.25
    for name, parameter in started["normalised"].named_parameters():
        assert name == "channel.weight" or torch.equal(parameter, started["literal"].get_parameter(name))


def test_training_on_what_differs_between_images_makes_normalised_channel_weights_differ():
    """Half of the images ask for one map, half for the other. The literal form learns that as well, at its ends."""
    f1, f2 = features(batch=8)
    odd = (torch.arange(8) % 2 == 1)[:, None, None, None]
    f1 = f1 + odd * torch.linspace(-1, 1, 24)[:, None, None]
    target, spread, at_the_ends = torch.where(odd, f2, f1), {}, {}
    for form in ("normalised", "literal"):
        block = ContextAwareFusion(24, channel_weights=form)
        block.reset_parameters(seeded())
        optimiser = torch.optim.Adam(block.parameters(), lr=5e-3)
        for _ in range(40):
            optimiser.zero_grad()
            F.mse_loss(block(f1, f2), target).backward()
            optimiser.step()
        logits = block.eval().channel_logits(f1, f2).detach()
        spread[form], at_the_ends[form] = torch.sigmoid(logits).std(0).mean().item(), share_at_the_ends(logits)
    assert spread["normalised"] > 0.12 > spread["literal"]
    assert at_the_ends["normalised"] < 0.05 < 0.5 < at_the_ends["literal"]


def test_normalised_channel_weights_do_not_see_how_large_the_maps_are():
    quiet, loud = ContextAwareFusion(24), ContextAwareFusion(24)
    for block, factor in ((quiet, 5), (loud, 250)):
        block.reset_parameters(seeded())
        nn.init.normal_(block.channel.weight, generator=seeded(1))
        block(*(factor * x for x in features()))
    f1, f2 = features()
    logits = quiet.eval().channel_logits(5 * f1, 5 * f2)
    torch.testing.assert_close(loud.eval().channel_logits(250 * f1, 250 * f2), logits, rtol=1e-2, atol=1e-2)
    assert logits.std(0).mean() > 0.1


def test_channel_pooling_keeps_height_and_width():
    """One changed pixel moves the gate within the reach of the kernel, and nowhere else."""
    block, (f1, f2) = random_block(), random_maps(size=(20, 21))
    changed = f1.detach().clone()
    changed[:, :, 10, 10] += 1
    moved = (block.spatial_logits(changed, f2) - block.spatial_logits(f1, f2))[0, 0] != 0
    rows, columns = moved.nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7, 13, 7, 13)


def test_the_global_map_comes_first():
    block, (f1, f2) = random_block(), random_maps()
    with torch.no_grad():
        block.reduce.weight[:, 4:] = 0
        block.channel.weight.zero_()
        block.spatial.weight.zero_()
    gate = torch.sigmoid(block.spatial.bias) * torch.sigmoid(block.channel.bias)[:4, None, None]
    expected = F.conv2d(gate * f1, block.reduce.weight[:, :4])
    torch.testing.assert_close(block(f1, f2), expected)


def test_every_parameter_gets_a_gradient():
    block = random_block()
    block(*random_maps()).square().sum().backward()
    assert {name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()} == set()


def test_starts_repeatably_and_without_bias():
    block, again = ContextAwareFusion(4), ContextAwareFusion(4)
    for twin in (block, again):
        twin.reset_parameters(seeded(4))
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), again.parameters(), strict=True))
    assert not block.channel.bias.any()
    assert not block.spatial.bias.any()


def test_b14_copies_pickles_and_compiles():
    block, maps = random_block(), random_maps()
    stream = io.BytesIO()
    torch.save(block, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(block), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(*maps), block(*maps))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*maps).square().sum(), maps)
    torch.testing.assert_close(got, torch.autograd.grad(block(*maps).square().sum(), maps))


@every_option
@pytest.mark.parametrize("size", [(5, 4), (1, 1)], ids=str)
def test_k25_autocast_trains(options, size):
    block, maps = random_block(dtype=torch.float32, **options), random_maps(size=size, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(*maps)
    out.float().square().sum().backward()
    torch.testing.assert_close(out.float(), block(*maps), atol=0.1, rtol=0.1)
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


def test_low_precision_network():
    block, maps = random_block().bfloat16(), [x.detach().bfloat16() for x in random_maps()]
    assert block(*maps).dtype == torch.bfloat16


def test_b5_refuses_maps_that_do_not_fit_naming_the_branch():
    block, (f1, f2) = random_block(), random_maps()
    message = r"local_features has shape \(2, 4, 5, 3\); expected \(2, 4, 5, 4\), the shape of global_features"
    with pytest.raises(ShapeError, match=message):
        block(f1, f2[..., :3])
    with pytest.raises(ShapeError, match=r"global_features has shape \(4, 5, 4\); expected \(B, 4, H, W\)"):
        block(f1[0], f2)
    with pytest.raises(ShapeError, match=r"local_features has shape \(2, 5, 4, 4\).*permute\(0, 3, 1, 2\)"):
        block(f1, f2.permute(0, 2, 3, 1))


def test_refuses_options_it_does_not_know():
    with pytest.raises(ValueError, match="spatial_pool: expected one of 'channel', 'local3', 'none', got 'global'"):
        ContextAwareFusion(4, spatial_pool="global")
    with pytest.raises(ValueError, match="channel_weights: expected one of 'normalised', 'literal', got 'as written'"):
        ContextAwareFusion(4, channel_weights="as written")
    with pytest.raises(ValueError, match="spatial_kernel must be odd, got 4"):
        ContextAwareFusion(4, spatial_kernel=4)
    assert isinstance(ContextAwareFusion(4, "none").spatial_global.bias, nn.Parameter)
