"""The decoder: its definition, its options, its cost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from trifuse.architectures.dino_unet import DinoUNetConfig
from trifuse.architectures.dino_unet.decoder import DinoUNetDecoder
from trifuse.architectures.dino_unet.variants import VARIANTS
from trifuse.kernels import ShapeError

D, CHANNELS, WIDTH = 12, (8, 6, 4), 10


def small_decoder(**options) -> DinoUNetDecoder:
    return DinoUNetDecoder(D, CHANNELS, WIDTH, **options).double()


def inputs(decoder: DinoUNetDecoder, grid=(3, 4), size=(42, 56), batch=2):
    """Return the arguments of forward, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = grid[0] * grid[1]
    last, *skips = (draw(batch, tokens, D) for _ in range(1 + len(CHANNELS)))
    fused = draw(batch, tokens, WIDTH) if decoder.proj_fused is not None else None
    return last, fused, skips, torch.tensor([0.5, 2.0, 1.5]).double(), grid, draw(batch, 3, *size)


def norm_relu(x: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, training=True))


def as_map(tokens: Tensor, grid) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def definition(decoder: DinoUNetDecoder, last, fused, skips, scales, grid, image) -> Tensor:
    """Section 5 of the network's description, written with 1x1 convolutions of maps."""
    project = lambda tokens, weight: F.conv2d(as_map(tokens, grid), weight[:, :, None, None])  # noqa: E731
    x = 0
    if decoder.proj_last is not None:
        x = x + project(last, decoder.proj_last.weight)
    if decoder.proj_fused is not None:
        x = x + as_map(fused, grid)
    x = norm_relu(x)
    for j, stage in enumerate(decoder.stages):
        x = F.conv_transpose2d(x, stage.up.weight, stage.up.bias, stride=2)
        size = tuple(x.shape[-2:])
        skip = norm_relu(project(skips[j], decoder.skips[j].proj.weight))
        joined = [F.interpolate(skip * scales[j], size=size, mode="bilinear"), x]
        if decoder.images:
            resized = F.interpolate(image, size=size, mode="bilinear", antialias=True)
            joined.insert(0, norm_relu(F.conv2d(resized, decoder.images[j].conv.conv.weight, padding=1)))
        x = torch.cat(joined, dim=1)
        for conv in stage.convs:
            x = norm_relu(F.conv2d(x, conv.conv.weight, padding=1))
    size = tuple(image.shape[-2:])
    if decoder.resize_features:
        x = F.interpolate(x, size=size, mode="bilinear")
    x = F.conv2d(x, decoder.head.weight, decoder.head.bias, padding=1)
    return x if decoder.resize_features else F.interpolate(x, size=size, mode="bilinear")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bottleneck": "last"},
        {"bottleneck": "fused"},
        {"spatial_integration": False},
        {"convs_per_stage": 2},
        {"final_resize": "features"},
        {"num_classes": 1},
    ],
)
def test_matches_definition(options):
    decoder = small_decoder(**options)
    arguments = inputs(decoder)
    torch.testing.assert_close(decoder(*arguments), definition(decoder, *arguments))


def test_without_scales_the_skips_are_taken_as_they_are():
    decoder = small_decoder()
    last, fused, skips, scales, grid, image = inputs(decoder)
    without = decoder(last, fused, skips, None, grid, image)
    assert torch.equal(without, decoder(last, fused, skips, torch.ones(3).double(), grid, image))
    assert not torch.allclose(without, decoder(last, fused, skips, scales, grid, image))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_convolutions_run_channels_last_on_a_cpu_where_the_norm_keeps_its_digits(norm):
    decoder = small_decoder(norm=norm)
    layouts = []
    for stage in decoder.stages:
        stage.convs.register_forward_pre_hook(
            lambda _, maps: layouts.append(maps[0].is_contiguous(memory_format=torch.channels_last))
        )
    logits = decoder(*inputs(decoder))
    assert layouts == [norm == "batch"] * len(CHANNELS)
    logits.sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.is_contiguous(), name
        assert name == "proj_fused.weight" or parameter.grad.is_contiguous(), name  # that one was applied before


@pytest.mark.parametrize(
    ("grid", "norm"),
    [
        ((3, 4), "batch"),
        ((3, 4), "instance"),
        ((3, 4), "group"),
        ((1, 1), "batch"),
        ((1, 1), "group"),
        ((5, 3), "batch"),
    ],
)
@pytest.mark.parametrize("conv_then_resize", [False, True])
def test_any_grid_and_any_size(grid, norm, conv_then_resize):
    decoder = small_decoder(norm=norm, conv_then_resize=conv_then_resize)
    for size in [(grid[0] * 14, grid[1] * 14), (11, 37)]:
        assert decoder(*inputs(decoder, grid, size)).shape == (2, 2, *size)


@pytest.mark.parametrize("bottleneck", ["last+fused", "last", "fused"])
@pytest.mark.parametrize("spatial_integration", [False, True])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_gradient_reaches_every_parameter(bottleneck, spatial_integration, norm):
    decoder = small_decoder(bottleneck=bottleneck, spatial_integration=spatial_integration, norm=norm)
    last, fused, skips, scales, grid, image = inputs(decoder)
    learned = [scales.requires_grad_()]
    if decoder.proj_fused is not None:
        learned.append(last.clone().requires_grad_())
        fused = decoder.proj_fused(learned[1])
    logits = decoder(last, fused, skips, scales, grid, image)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(tensor.grad.abs().min() > 0 for tensor in learned)


def test_initial_weights():
    decoder = DinoUNetDecoder(384)
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.weight.eq(1).all(), name
            assert module.bias.eq(0).all(), name
        elif name == "head":
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.15)
            assert module.bias.eq(0).all()
        elif hasattr(module, "weight"):
            fan_out = module.weight[0, 0].numel() * module.weight.shape[0]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15), name
            assert module.bias is None or module.bias.eq(0).all(), name


def test_initial_weights_follow_the_generator():
    def draw(seed):
        decoder = small_decoder()
        decoder.reset_parameters(torch.Generator().manual_seed(seed))
        return torch.cat([parameter.flatten() for parameter in decoder.parameters()])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(("variant", "gflops"), [("small", 63.7), ("base", 64.5), ("large", 65.0), ("giant", 66.0)])
def test_operations_at_448(variant, gflops):
    """The floating-point operations of all convolutions, as published with the network's description."""
    with torch.device("meta"):
        width = VARIANTS[variant].embed_dim
        decoder = DinoUNetDecoder(width, DinoUNetConfig.channels)
        tokens, image = torch.empty(1, 32 * 32, width), torch.empty(1, 3, 448, 448)
        with FlopCounterMode(display=False) as counter:
            decoder(tokens, decoder.proj_fused(tokens), [tokens] * 4, None, (32, 32), image)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, abs=0.05)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2, 4])
def test_b6_wrong_number_of_skips(count):
    decoder = small_decoder()
    last, fused, skips, scales, grid, image = inputs(decoder)
    with pytest.raises(ShapeError, match=f"a skip for each of the 3 stages, coarsest first, got {count} of shapes"):
        decoder(last, fused, (skips * 2)[:count], scales, grid, image)


def test_b6_tokens_that_do_not_fill_the_grid():
    decoder = small_decoder()
    last, fused, skips, scales, grid, image = inputs(decoder)
    with pytest.raises(ShapeError, match=r"expected skip of stage 2 of shape \(B, 3 \* 4, D\).*got \(2, 13, 12\)"):
        decoder(last, fused, [skips[0], torch.zeros(2, 13, D), skips[2]], scales, grid, image)
    with pytest.raises(ShapeError, match=r"expected last of shape .* got \(2, 12, 3, 4\)"):
        decoder(as_map(last, grid), fused, skips, scales, grid, image)
    for name, broken in (("last", (None, fused)), ("fused", (last, None))):
        with pytest.raises(ShapeError, match=f"the bottleneck needs '{name}', got None"):
            decoder(*broken, skips, scales, grid, image)


def test_b7_batch_norm_of_a_single_value():
    decoder = small_decoder()
    with pytest.raises(ShapeError, match="use a larger batch or image, or norm='group'"):
        decoder(*inputs(decoder, grid=(1, 1), batch=1))
    decoder = small_decoder(norm="group")
    assert decoder(*inputs(decoder, grid=(1, 1), batch=1)).isfinite().all()


# --- as a module ------------------------------------------------------------------------------------------------------


def test_b14_copies_and_pickles():
    decoder = small_decoder().eval()
    arguments = inputs(decoder)
    for twin in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)), copy.deepcopy(decoder).share_memory()):
        assert torch.equal(twin(*arguments), decoder(*arguments))
