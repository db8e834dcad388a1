"""The networks as written that ours are timed against compute the same: values and gradients in float64."""

from __future__ import annotations

import pytest
import torch

from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig
from trifuse.architectures.taff_unet import TaffUNet, TaffUNetConfig
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.benchmarks.baselines.taff_unet import AsWritten, loss_as_written

SIDE = 32
TAFF = TaffUNet, TaffUNetConfig("full", 3, SIDE, base_dim=4, fusion_stage=1)
PLAIN = PlainUNet, PlainUNetConfig(1, 3, SIDE, base_dim=4)


def a_batch(kind):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (2, SIDE, SIDE), generator=generator)
    if kind is PlainUNet:
        return (image,), target
    prior = torch.randint(2, (2, 17, SIDE, SIDE), generator=generator).double()
    ecg = torch.randn(2, 12, 608, generator=generator, dtype=torch.float64)
    return (image, prior, ecg, torch.tensor([0.0, 40.0], dtype=torch.float64)), target


def gradients(network, loss, inputs, parameters):
    torch.manual_seed(0)
    value = loss(network.train()(*inputs))
    return value.detach(), torch.autograd.grad(value, list(parameters.values()), allow_unused=True)


@pytest.mark.parametrize(("kind", "config"), [TAFF, PLAIN], ids=["taff_unet", "plain_unet"])
def test_network_as_written_is_ours(kind, config):
    network = kind(config).double()
    generator = torch.Generator().manual_seed(1)
    if kind is TaffUNet:  # or time and gate would be where they start, at zero
        gate = network.fusion.gate
        for part in (gate.others, gate.time, network.fusion.film.mlp):
            torch.nn.init.normal_(part.second.weight, std=0.3, generator=generator)
    written = AsWritten(network)
    kinds = {type(module).__name__ for module in written.modules()}
    assert not kinds & {"InstanceNorm", "TemporalAwareFusion"}
    parameters = dict(network.named_parameters())
    assert {id(p) for p in written.parameters()} == {id(p) for p in parameters.values()}
    inputs, target = a_batch(kind)
    fused = SegmentationLoss()
    value, mine = gradients(network, lambda maps: fused(maps, {"target": target}, None), inputs, parameters)
    expected, theirs = gradients(written, lambda maps: loss_as_written(maps, target), inputs, parameters)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    for name, gradient, twin in zip(parameters, mine, theirs, strict=True):
        if twin is None:
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, twin, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(*inputs), written.eval()(*inputs), rtol=1e-8, atol=1e-10)
