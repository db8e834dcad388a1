"""Convolution, norm and rectifier: how its weights begin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trifuse.blocks.conv_norm_relu import ConvNormReLU, init_convs


def drawn(seed: int) -> torch.Tensor:
    unit = ConvNormReLU(8, 256, kernel_size=3)
    unit.reset_parameters(torch.Generator().manual_seed(seed))
    return unit.conv.weight.detach()


def test_weights_are_drawn_by_the_generator_from_hes_distribution_over_the_fan_out():
    weight = drawn(0)
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert torch.equal(weight, drawn(0))
    assert not torch.equal(weight, drawn(1))


def test_transposed_convolutions_and_projections_are_drawn_too_and_biases_are_zero():
    layers = nn.ModuleList([nn.Conv2d(64, 64, 3), nn.ConvTranspose2d(64, 64, 3), nn.Linear(64, 64)])
    init_convs(layers, torch.Generator().manual_seed(0))
    for layer in layers:
        fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)[1]
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert not layer.bias.any()
