"""The plain FIAS that ours is timed against computes the same: values and gradients in float64, down to rounding."""

from __future__ import annotations

import torch

from trifuse.architectures.fias import Fias, FiasConfig
from trifuse.benchmarks.baselines import fias as baseline
from trifuse.kernels import mutation_loss, upsample_argmax


def one_step(network, loss):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, 64, 64, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (2, 64, 64), generator=generator)
    torch.manual_seed(0)
    value = loss(network.train()(image), target)
    value.backward()
    return value.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


def with_channel_weights(network):
    """In float64, and with channel weights of its fusions that have left 1/2."""
    for fusion in network.fusions:
        torch.nn.init.normal_(fusion.channel.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return network.double()


def test_plain_network_and_losses_are_those_of_ours():
    network = with_channel_weights(Fias(FiasConfig(variant="nano", num_classes=5, dropout=0.1, drop_path=0.1)))
    plain = baseline.plain_fias(network)
    kinds = {type(module).__name__ for module in plain.modules()}
    assert kinds >= {
        "UnfoldedAttention",
        "NaiveAttention",
        "SeparateKernels",
        "ConcatenatedFusion",
        "ShuffledAttention",
    }
    assert not kinds & {"DilatedAttention", "ParallelKernels", "ContextAwareFusion", "MonteCarloAttention"}
    value, gradients = one_step(network, mutation_loss)
    plain_value, plain_gradients = one_step(plain, baseline.seven_losses)
    torch.testing.assert_close(value, plain_value, rtol=1e-10, atol=0)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        twin = plain_gradients[name]
        torch.testing.assert_close(gradient, twin, rtol=1e-6, atol=1e-9 * twin.abs().max().item() + 1e-12)


def test_plain_network_predicts_what_ours_does_on_the_same_parameters():
    network = with_channel_weights(Fias(FiasConfig(variant="nano", num_classes=5)))
    plain = baseline.plain_fias(network)
    assert {id(p) for p in plain.parameters()} == {id(p) for p in network.parameters()}
    image = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        maps, plain_maps = network.eval().head_maps(image), plain.eval().head_maps(image)
    for ours, theirs in zip(maps, plain_maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert torch.equal(upsample_argmax(maps, (64, 64)), baseline.labels_plainly(plain_maps, (64, 64)))
