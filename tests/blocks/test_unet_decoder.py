"""One stage of a U-Net decoder."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from trifuse.blocks.unet_decoder import UNetDecoderStage
from trifuse.kernels import ShapeError


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 3, 4), (2, 4, 6, 8), (2, 2, 6, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("convs", [1, 2])
def test_matches_definition(convs):
    x, first, second = inputs()
    stage = UNetDecoderStage(5, 6, side_dims=[4, 2], convs=convs).double()
    expected = torch.cat([first, second, F.conv_transpose2d(x, stage.up.weight, stage.up.bias, stride=2)], dim=1)
    for conv in stage.convs:
        expected = F.conv2d(expected, conv.conv.weight, padding=1)
        expected = F.relu(F.batch_norm(expected, None, None, training=True))
    torch.testing.assert_close(stage(x, [first, second]), expected)
    assert len(stage.convs) == convs
    assert stage.up.bias.abs().sum() == 0


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_gradient_reaches_every_parameter_and_every_input(norm):
    maps = [tensor.requires_grad_() for tensor in inputs()]
    stage = UNetDecoderStage(5, 8, side_dims=[4, 2], norm=norm).double()
    # A norm swallows the bias of what is only added to its input; here it passes a convolution with borders first.
    (stage(maps[0], maps[1:]) * torch.randn(2, 8, 6, 8, dtype=torch.float64)).sum().backward()
    for name, tensor in [*stage.named_parameters(), *zip(["x", "first", "second"], maps, strict=True)]:
        assert tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "sides",
    [
        lambda a, b: [a],
        lambda a, b: [b, a],
        lambda a, b: [a, b, b],
        lambda a, b: [a, b[..., :4]],
        lambda a, b: [a[:1], b],
    ],
)
def test_b6_wrong_side_maps_are_listed(sides):
    x, first, second = inputs()
    stage = UNetDecoderStage(5, 6, side_dims=[4, 2]).double()
    with pytest.raises(ShapeError, match=r"expected side maps of shapes \[\(2, 4, 6, 8\), \(2, 2, 6, 8\)\], got \["):
        stage(x, sides(first, second))


def test_rejects_no_convolution():
    with pytest.raises(ValueError, match="at least one convolution, got convs=0"):
        UNetDecoderStage(4, 4, [], convs=0)


def test_rejects_one_number_for_the_side_maps():
    with pytest.raises(ShapeError, match=r"side_dims: expected a sequence of whole numbers, got 16; pass \(16,\)$"):
        UNetDecoderStage(24, 16, 16)


def test_initial_weights_follow_the_generator():
    def draw(seed):
        stage = UNetDecoderStage(5, 6, side_dims=[4])
        stage.reset_parameters(torch.Generator().manual_seed(seed))
        return torch.cat([parameter.flatten() for parameter in stage.parameters()])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_b14_copies_and_pickles():
    x, *sides = inputs()
    stage = UNetDecoderStage(5, 6, side_dims=[4, 2]).double().eval()
    for twin in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert torch.equal(twin(x, sides), stage(x, sides))
