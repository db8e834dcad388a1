"""Groups are disjoint, complete, free of frozen parameters, and each learns in its own way."""

from __future__ import annotations

import pytest
import torch
from tiny_run import TinyNet, recipe
from torch import nn

from trifuse.architectures.training.parameter_groups import make_groups


def test_one_group_of_everything_that_learns_b12():
    model = TinyNet()
    (group,) = make_groups(model, recipe(), None)
    assert set(group.parameters) == {name for name, p in model.named_parameters() if not name.startswith("encoder.")}


def test_groups_differ_where_they_say_so():
    model = TinyNet()

    def groups(model):
        return [
            {
                "name": "body",
                "params": model.body.parameters(),
                "optimizer": "sgd",
                "schedule": "poly",
                "grad_clip": 12,
            },
            {"name": "rest", "params": [*model.norm.parameters(), *model.head.parameters()], "lr_mult": 0.1}
            | {"weight_decay": 0.0},
        ]

    body, rest = make_groups(model, recipe(lr=1.0, momentum=0.99, weight_decay=3e-5, epochs=4), groups)
    assert isinstance(body.optimizer, torch.optim.SGD)
    assert body.optimizer.defaults["nesterov"]
    assert body.optimizer.defaults["momentum"] == 0.99
    assert body.optimizer.defaults["weight_decay"] == 3e-5
    assert isinstance(rest.optimizer, torch.optim.AdamW)
    assert rest.optimizer.defaults["weight_decay"] == 0
    assert (body.lr, rest.lr) == (1.0, 0.1)
    assert (body.grad_clip, rest.grad_clip) == (12, None)
    assert body.set_learning_rate(recipe(epochs=4), step=7, steps_per_epoch=7) == 0.75**0.9
    assert body.optimizer.param_groups[0]["lr"] == 0.75**0.9
    assert rest.set_learning_rate(recipe(epochs=4, lr=1.0), step=14, steps_per_epoch=7) == pytest.approx(0.05)


def test_adam_decays_through_the_gradient():
    (group,) = make_groups(TinyNet(), recipe(optimizer="adam", betas=(0.8, 0.9)), None)
    assert type(group.optimizer) is torch.optim.Adam
    assert group.optimizer.defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda m: [{"name": "a", "params": m.parameters()}], "encoder.weight is frozen but in group 'a'"),
        (lambda m: [{"name": "a", "params": m.head.parameters()}], "body.weight is in no group"),
        (
            lambda m: [{"name": n, "params": m.head.parameters()} for n in "ab"],
            "head.weight is in group 'a' and again in 'b'",
        ),
        (lambda m: [{"name": "a", "params": m.head.parameters()}, {"name": "a", "params": []}], "the same name"),
        (lambda m: [{"name": "a", "params": []}], "group 'a' is empty; is everything frozen"),
        (
            lambda m: [{"name": "a", "params": m.head.parameters(), "rate": 1}],
            r"unknown keys \['rate'\]; allowed: .*lr_mult",
        ),
        (lambda m: [{"name": "a", "params": [nn.Parameter(torch.ones(1))]}], "no parameter of the model"),
        (lambda m: [{"name": "a", "params": m.head.parameters(), "lr": 1, "lr_mult": 2}], "both lr and lr_mult"),
    ],
)
def test_rejects(groups, message):
    with pytest.raises(ValueError, match=message):
        make_groups(TinyNet(), recipe(), groups)


def test_clipping_is_by_group():
    model = TinyNet()
    (group,) = make_groups(model, recipe(grad_clip=1.0), None)
    assert group.clip_gradient() == 0
    for parameter in group.parameters.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    count = sum(parameter.numel() for parameter in group.parameters.values())
    assert group.clip_gradient() == pytest.approx(2 * count**0.5)
    assert group.clip_gradient() == pytest.approx(1, rel=1e-5)


def test_a_group_has_a_gradient_where_any_of_its_parameters_has_one():
    (group,) = make_groups(TinyNet(), recipe(), None)
    assert not group.has_gradient
    parameter = next(iter(group.parameters.values()))
    parameter.grad = torch.zeros_like(parameter)
    assert group.has_gradient


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("steps", [0, 2])
def test_state_round_trip(optimizer, steps):
    def trained(model, group, times):
        for _ in range(times):
            group.optimizer.zero_grad()
            model(torch.ones(1, 3, 8, 8)).square().sum().backward()
            group.optimizer.step()

    model, other = TinyNet(), TinyNet()
    (group,) = make_groups(model, recipe(optimizer=optimizer), None)
    (copy,) = make_groups(other, recipe(optimizer=optimizer), None)
    trained(model, group, steps)
    other.load_state_dict(model.state_dict())
    copy.load_state({name: tensor.clone() for name, tensor in group.state().items()})
    trained(model, group, 2)
    trained(other, copy, 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_saved_state_lies_as_its_parameter_does_again(optimizer):
    """Fused optimisers, which are those of a GPU, take no other; a file keeps values alone."""
    model = TinyNet().to(memory_format=torch.channels_last)
    (group,) = make_groups(model, recipe(optimizer=optimizer), None)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    group.optimizer.step()
    group.load_state(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in group.state().items()}
    )
    of_body = [x for x in group.optimizer.state[model.body.weight].values() if torch.is_tensor(x) and x.ndim]
    assert of_body
    assert all(x.stride() == model.body.weight.stride() for x in of_body)
