"""The depthwise multi-kernel unit: its equations, its options, the encoder's parameters, and every refusal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from trifuse.blocks import ConvNormReLU, DepthwiseMultiKernel
from trifuse.kernels import ShapeError


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernels", [(5, 7), (3,), (1, 3, 9)], ids=str)
def test_unit_is_its_equations(kernels):
    """L from the first convolution; each depthwise convolution reads L; their sum with L is mixed by 1x1."""
    block = DepthwiseMultiKernel(3, 8, kernels=kernels)
    (unit,) = block.units
    x = drawn(2, 3, 12, 10)
    local = torch.relu(unit.reduce.norm(nn.functional.conv2d(x, unit.reduce.conv.weight, stride=2, padding=1)))
    total = local
    for conv, k in zip(unit.depthwise.convs, kernels, strict=True):
        assert conv.weight.shape == (8, 1, k, k)
        assert conv.bias is None
        total = total + nn.functional.conv2d(local, conv.weight, padding=k // 2, groups=8)
    expected = torch.relu(unit.project.norm(nn.functional.conv2d(total, unit.project.conv.weight)))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_encoder_has_the_parameters_of_the_paper():
    dims = (36, 72, 144, 288, 576)
    stages = [DepthwiseMultiKernel(a, b) for a, b in pairwise(dims)]
    assert count(ConvNormReLU(3, 36, stride=2)) + sum(map(count, stages)) == 2_508_804


@pytest.mark.parametrize("depth", [1, 3])
def test_depth_repeats_the_unit_at_one_size(depth):
    block = DepthwiseMultiKernel(3, 4, depth=depth)
    assert [unit.reduce.conv.stride for unit in block.units] == [(2, 2)] + [(1, 1)] * (depth - 1)
    assert [unit.reduce.conv.in_channels for unit in block.units] == [3] + [4] * (depth - 1)
    assert block(drawn(1, 3, 9, 8)).shape == (1, 4, 5, 4)


def test_depthwise_reduction_lets_each_channel_read_one():
    block = DepthwiseMultiKernel(3, 6, ks_groups="depthwise", depth=2).eval()
    assert [unit.reduce.conv.weight.shape for unit in block.units] == [(6, 1, 3, 3)] * 2
    x = drawn(1, 3, 8, 8)
    changed = x.clone()
    changed[:, 2] += 1
    reduce = block.units[0].reduce
    differs = (reduce.conv(changed) != reduce.conv(x)).any(dim=(0, 2, 3))
    assert differs.tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 3, 1, 5), (1, 3, 7, 3)], ids=str)
def test_maps_smaller_than_the_kernels(shape):
    block = DepthwiseMultiKernel(3, 4)
    block(drawn(*shape)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_norms(norm):
    block = DepthwiseMultiKernel(3, 8, norm=norm)
    assert type(block.units[0].reduce.norm) is type(block.units[0].project.norm)
    assert block(drawn(2, 3, 8, 8)).shape == (2, 8, 4, 4)


def test_every_part_learns_and_channels_last_stays():
    block = DepthwiseMultiKernel(4, 8, stride=1)
    x = drawn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = block(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in (x, *block.parameters()))


def test_weights_are_drawn_from_the_generator():
    first, second = (DepthwiseMultiKernel(3, 8) for _ in range(2))
    for block in (first, second):
        block.reset_parameters(torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    wide = DepthwiseMultiKernel(64, 128)
    wide.reset_parameters(torch.Generator().manual_seed(0))
    fan_out = 128 * 3 * 3
    assert wide.units[0].reduce.conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks_groups": "sparse"}, "ks_groups: expected one of 'dense', 'depthwise', got 'sparse'"),
        ({"ks_groups": "depthwise"}, "in_dim 3 must divide dim 8"),
        ({"kernels": ()}, r"kernels must be odd numbers, at least one, got \(\)"),
        ({"kernels": (5, 6)}, r"got \(5, 6\)"),
        ({"kernels": (-1,)}, r"got \(-1,\)"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"norm": "layer"}, "norm: expected one of .*, got 'layer'"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DepthwiseMultiKernel(3, 8, **options)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 8, 3)], ids=str)
def test_refuses_maps_of_other_shapes(shape):
    with pytest.raises(ShapeError, match=r"expected \(B, 3, H, W\); bring channels-last data there"):
        DepthwiseMultiKernel(3, 8)(torch.zeros(shape))
