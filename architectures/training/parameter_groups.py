"""Parameters in named groups, each with its own optimiser and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Optimizer, Recipe, Schedule
from .schedules import learning_rate

GroupSpecification = Sequence[Mapping[str, Any]]
"""One mapping per group: "name" and "params", and what differs from the recipe: "lr" or "lr_mult" (a factor on the
recipe's), "weight_decay", "optimizer", "schedule", "grad_clip"."""

_KEYS = {"name", "params", "lr", "lr_mult", "weight_decay", "optimizer", "schedule", "grad_clip"}


@dataclass
class ParameterGroup:
    """Some parameters of a network, and how they learn.

    Attributes:
        name: in the log and in the checkpoint.
        parameters: by their names in the network.
        optimizer: holds these parameters alone.
        lr: highest learning rate.
        schedule: how the learning rate moves.
        grad_clip: largest norm of the group's gradient; None for no limit.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr: float
    schedule: Schedule
    grad_clip: float | None

    def set_learning_rate(self, recipe: Recipe, step: int, steps_per_epoch: int) -> float:
        """Set and return the learning rate of a step, counted from 0."""
        lr = learning_rate(self.schedule, recipe, lr=self.lr, step=step, steps_per_epoch=steps_per_epoch)
        settings = self.optimizer.param_groups[0]
        if isinstance(settings["lr"], Tensor):
            settings["lr"].fill_(lr)
        else:
            settings["lr"] = lr
        return lr

    @property
    def has_gradient(self) -> bool:
        """Whether the last backward pass reached any of the parameters."""
        return any(p.grad is not None for p in self.parameters.values())

    def clip_gradient(self) -> Tensor:
        """Bring the gradient to ``grad_clip`` where it is larger, and return the norm that it had, on its device."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=next(iter(self.parameters.values())).device)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.grad_clip, norm)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's state, ``<parameter>/<what>`` by name."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        entries: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            own = {
                key.rpartition("/")[2]: _laid_out_as(parameter, value)
                for key, value in state.items()
                if key.rpartition("/")[0] == name
            }
            if own:
                entries[index] = own
        self.optimizer.load_state_dict({"state": entries, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a state in memory as its parameter is, which fused optimisers insist on; a file has lost that."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value) if value.shape == parameter.shape else value


def make_groups(
    model: nn.Module,
    recipe: Recipe,
    specification: GroupSpecification | Callable[[nn.Module], GroupSpecification] | None,
) -> list[ParameterGroup]:
    """Make the optimisers of a network's trainable parameters.

    Args:
        model: every parameter with ``requires_grad`` belongs to exactly one group, no other to any.
        recipe: what holds for all groups.
        specification: the groups, or a function that names them for this model; None for one group of everything.

    Raises:
        ValueError: a parameter is in no group, in two, or frozen; a group is empty or has an unknown key.
    """
    if specification is None:
        specification = [{"name": "all", "params": [p for p in model.parameters() if p.requires_grad]}]
    elif callable(specification):
        specification = specification(model)
    groups = [dict(group, params=list(group["params"])) for group in specification]
    _check_groups(model, groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [_make_group(group, {names[p]: p for p in group["params"]}, recipe) for group in groups]


def _make_group(group: Mapping[str, Any], parameters: dict[str, nn.Parameter], recipe: Recipe) -> ParameterGroup:
    lr = group.get("lr", recipe.lr * group.get("lr_mult", 1.0))
    weight_decay = group.get("weight_decay", recipe.weight_decay)
    optimizer = _make_optimizer(
        group.get("optimizer", recipe.optimizer), parameters.values(), recipe, lr=lr, weight_decay=weight_decay
    )
    schedule = group.get("schedule", recipe.schedule)
    return ParameterGroup(group["name"], parameters, optimizer, lr, schedule, group.get("grad_clip", recipe.grad_clip))


def _make_optimizer(
    kind: Optimizer, parameters: Iterable[nn.Parameter], recipe: Recipe, *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    device = next(iter(parameters)).device
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if device.type == "cuda":  # few launches, which read the learning rate where it lies: they can be recorded
        options |= {"lr": torch.tensor(lr, device=device), "fused": True}
    if kind == "sgd":
        momentum = recipe.momentum
        return torch.optim.SGD(parameters, momentum=momentum, nesterov=momentum > 0, **options)
    family = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return family(parameters, betas=recipe.betas, **options)


def _check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    problems = []
    owner: dict[nn.Parameter, str] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    if len({group["name"] for group in groups}) < len(groups):
        problems.append("two groups have the same name")
    for group in groups:
        if unknown := sorted(set(group) - _KEYS):
            problems.append(f"group {group['name']!r} has unknown keys {unknown}; allowed: {sorted(_KEYS)}")
        if "lr" in group and "lr_mult" in group:
            problems.append(f"group {group['name']!r} has both lr and lr_mult; leave one out")
        if not group["params"]:
            problems.append(f"group {group['name']!r} is empty; is everything frozen?")
        for parameter in group["params"]:
            name = names.get(parameter)
            if name is None:
                problems.append(f"group {group['name']!r} holds a tensor that is no parameter of the model")
            elif parameter in owner:
                problems.append(f"{name} is in group {owner[parameter]!r} and again in {group['name']!r}")
            elif not parameter.requires_grad:
                problems.append(f"{name} is frozen but in group {group['name']!r}")
            owner[parameter] = group["name"]
    problems += [f"{name} is in no group" for p, name in names.items() if p.requires_grad and p not in owner]
    if problems:
        raise ValueError("parameter groups: " + "\n  ".join(problems))
