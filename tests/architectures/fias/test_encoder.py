"""The encoder's parts: how images become three channels, the local maps, and the fusions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.architectures.fias.encoder import InputAdapter, LocalEncoder, make_fusion
from trifuse.blocks import ContextAwareFusion


def tensors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_adapters_make_three_channels():
    x = tensors(2, 1, 4, 5)
    conv = InputAdapter("conv", 1)
    weight, bias = conv.conv.weight, conv.conv.bias
    torch.testing.assert_close(conv(x), x * weight.view(1, 3, 1, 1) + bias.view(1, 3, 1, 1))
    assert bool((conv(x) < 0).any())  # values below zero pass, which they would not with a rectifier
    assert torch.equal(InputAdapter("repeat", 1)(x), torch.cat([x, x, x], dim=1))
    merit = InputAdapter("merit", 1)(x)
    assert merit.shape == (2, 3, 4, 5)
    assert float(merit.detach().min()) == 0.0
    colour = tensors(2, 3, 4, 5)
    assert torch.equal(InputAdapter("none", 3)(colour), colour)
    assert InputAdapter("conv", 4)(tensors(2, 4, 4, 5)).shape == (2, 3, 4, 5)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 32)])
def test_local_maps_have_the_sizes_of_the_global_ones(height, width):
    """Down to a single pixel, smaller than every kernel."""
    dims = (12, 24, 48, 96)
    encoder = LocalEncoder(dims).eval()
    assert encoder.stem.conv.out_channels == 6
    maps = encoder(tensors(1, 3, height, width))
    sizes = [(1, dim, height // step, width // step) for dim, step in zip(dims, (4, 8, 16, 32), strict=True)]
    assert [tuple(x.shape) for x in maps] == sizes


def test_local_maps_follow_one_another():
    encoder = LocalEncoder((12, 24, 48, 96)).eval()
    x = encoder.stem(tensors(1, 3, 64, 64))
    for stage, features in zip(encoder.stages, encoder(tensors(1, 3, 64, 64)), strict=True):
        x = stage(x)
        assert torch.equal(x, features)


def test_fusions():
    a, b = tensors(2, 6, 3, 4), tensors(2, 6, 3, 4, seed=1)
    assert torch.equal(make_fusion("sum", 6)(a, b), a + b)
    concat = make_fusion("concat", 6)
    torch.testing.assert_close(concat(a, b), F.conv2d(torch.cat([a, b], dim=1), concat.conv.weight))
    caf = make_fusion("caf", 6, spatial_pool="none", max_pool=False)
    assert isinstance(caf, ContextAwareFusion)
    assert caf(a, b).shape == a.shape
