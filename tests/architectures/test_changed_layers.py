"""Adapters, hooks, pruning and weight norms on any convolution or linear layer of a network act, or are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from changed_layers import CHANGES, SILENT, Adapter, hooked_with_a_term, layers_of, parts_of, quantised, rounded
from tiny_networks import NETWORKS
from torch import nn

from trifuse.kernels import TrifuseError

NAMES = ["dino_unet", "dino_unet streaming", "ecg_autoencoder", "fias", "plain_unet", "taff_unet full"]


def made(name: str) -> tuple[nn.Module, dict]:
    """A network whose layers all count, and a batch."""
    torch.manual_seed(0)
    model = NETWORKS[name].make()
    with torch.no_grad():  # a last layer of zeros hides what is before it
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, NETWORKS[name].batch(2)


def step(name: str, model: nn.Module, batch: dict) -> float:
    """Compute the loss of a step with the draws of one seed, and its gradients."""
    torch.manual_seed(4)
    model.zero_grad()
    loss = NETWORKS[name].step(model, batch)
    loss.backward()
    return loss.item()


def trained_layers(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The layers whose weights got a gradient in the step before."""
    return [found for found in layers_of(model) if getattr(found[1], found[2]).weight.grad is not None]


@pytest.mark.parametrize("change", ["adapter", "forward hook", "weight norm by a hook", "pruning"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_done_to_every_trained_layer_acts_and_trains(name, change):
    model, batch = made(name)
    before = step(name, model, batch)
    learned = {path: CHANGES[change](parent, layer) for path, parent, layer in trained_layers(model)}
    optimiser = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-3)
    losses = []
    for _ in range(2):
        losses.append(step(name, model, batch))
        without = [path for path, parameter in learned.items() if parameter.grad is None or not parameter.grad.any()]
        assert not without
        optimiser.step()
    assert losses[0] != losses[1]
    assert (losses[0] == pytest.approx(before, rel=1e-5)) == (change in SILENT)


WITHOUT_EFFECT = {
    "fias": {"global_encoder.stages.3.downsample"},  # nothing follows the last stage
    "plain_unet": {"decoder.seg_layers.0"},  # the loss leaves the coarsest logits out
    "taff_unet full": {"ecg"},  # its encoder and its decoder are called
}


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_of_any_part_acts(name):
    model, batch = made(name)
    state = copy.deepcopy(model.state_dict())  # running statistics among it
    before = step(name, model, batch)
    without = set()
    for path, part in parts_of(model):
        model.load_state_dict(state)
        with hooked_with_a_term(part):
            without |= {path} if step(name, model, batch) == before else set()
    assert without == WITHOUT_EFFECT.get(name, set())


@pytest.mark.parametrize("name", ["dino_unet", "dino_unet streaming", "ecg_autoencoder", "fias"])
def test_dynamic_quantisation_acts(name):
    model, batch = made(name)
    with torch.no_grad():
        before = torch.as_tensor(NETWORKS[name].predict(model.eval(), batch))
        after = torch.as_tensor(NETWORKS[name].predict(quantised(model), batch))
    assert 0 < (after - before).norm() < 0.2 * before.norm()


@pytest.mark.parametrize("name", NAMES)
def test_layers_without_parameters_are_called(name):
    model, batch = made(name)
    with torch.no_grad():
        before = NETWORKS[name].predict(model.eval(), batch)
        for _, parent, layer in list(layers_of(model)):
            rounded(parent, layer)
        after = NETWORKS[name].predict(model, batch)
    assert not torch.equal(torch.as_tensor(after), torch.as_tensor(before))


@pytest.mark.parametrize("name", ["dino_unet", "dino_unet streaming"])
def test_an_adapter_of_the_frozen_encoder_acts_and_one_that_learns_is_refused(name):
    model, batch = made(name)
    model.eval()
    before = model(batch["image"])
    attention = model.encoder.blocks[1].attn
    attention.qkv = Adapter(attention.qkv)
    assert not torch.allclose(model(batch["image"]), before)
    attention.qkv.size.requires_grad_()
    with pytest.raises(TrifuseError, match=r"blocks\.1\.attn\.qkv\.size was asked to require gradients"):
        model(batch["image"])
