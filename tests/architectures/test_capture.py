"""A training step as a CUDA graph would record it: on the meta device, where no value exists that it could wait for.

What asks for a value raises there by itself. What merely copies between host and device, which makes the host wait and
cannot be recorded from pageable memory, is refused by `NothingFromTheHost`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_networks import NETWORKS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trifuse import kernels
from trifuse.architectures.training.parameter_groups import make_groups
from trifuse.architectures.training.recipe import Recipe
from trifuse.blocks import MonteCarloAttention, TemporalFiLMGate, WeightedBlockFusion

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.nonzero_static,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_dim,
}
BUILT_ON_THE_HOST = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.asarray, torch.from_numpy}


class Waits(AssertionError):
    """A step asked the host for something, or the host asked the device."""


class _Operations(TorchDispatchMode):
    """Refuse operations whose result the host needs, and those between host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_device = [tensor.device.type == "meta" for tensor in (*given, *made)]
        if any(on_device) and func.overloadpacket in WAITING:
            raise Waits(f"{func} waits for the device")
        from_host = [x for x in given if x.device.type == "cpu" and (x.ndim or func.overloadpacket is aten._to_copy)]
        if any(on_device) and (from_host or (given and not all(x.device.type == "meta" for x in made))):
            raise Waits(f"{func} moves a tensor between host and device")
        return result


class _Calls(TorchFunctionMode):
    """Refuse tensors that are made of the host's values on the device: their copy is invisible to the operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and _lists_in(args[1]) and args[0].device.type == "meta":
            raise Waits(f"an index of the host's numbers, {args[1]}")
        result = func(*args, **kwargs)
        if func in BUILT_ON_THE_HOST and result.device.type == "meta" and result is not args[0]:
            raise Waits(f"{func.__name__} of the host's numbers on the device")
        return result


def _lists_in(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(part, list) for part in index))


class NothingFromTheHost:
    """Inside, nothing passes between host and device, and the host learns no value of the device's."""

    def __enter__(self) -> None:
        self._modes = [_Calls(), _Operations()]
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def training_step(model: nn.Module, step: Callable[[], Tensor], optimizer: str) -> None:
    """What `fit` does with a batch, up to what it reads for the log: all groups clipped, then all updated."""
    recipe = Recipe(epochs=1, batch_size=2, lr=0.1, optimizer=optimizer, grad_clip=1.0)
    groups = make_groups(model, recipe, None)
    with NothingFromTheHost():
        for _ in range(2):
            for group in groups:
                group.optimizer.zero_grad(set_to_none=True)
            step().backward()
            norms = [group.clip_gradient() for group in groups]
            for group in groups:
                group.optimizer.step()
        assert all(norm.device.type == "meta" for norm in norms)


# Each of these has all its parts in another network.
VARIANTS = {
    "dino_unet with fixed blocks",
    "dino_unet streaming",
    "dino_unet streaming skips alone",
    "taff_unet ecg",
    "taff_unet ecg_time",
    "taff_unet ecg_ap",
    "taff_unet full",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in NETWORKS]
)
def test_a_step_waits_for_nothing(name):
    network = NETWORKS[name]
    model = network.make().to("meta").train()
    batch = {key: value.to("meta") for key, value in network.batch(2).items()}
    training_step(model, lambda: network.step(model, batch), "sgd")
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_waits_for_nothing(name):
    network = NETWORKS[name]
    model = network.make().to("meta").eval()
    batch = {key: value.to("meta") for key, value in network.batch(2).items()}
    with torch.no_grad(), NothingFromTheHost():
        network.predict(model, batch)


@pytest.mark.parametrize("draw", ["batch", "sample"])
def test_draws_of_monte_carlo_attention_are_made_where_the_map_is(draw):
    block, x = MonteCarloAttention(8, draw=draw).to("meta"), torch.empty(2, 8, 4, 4, device="meta")
    with NothingFromTheHost():
        scale, cell, permutation = block.draw_cell(x)
        block(x)
    for drawn in (scale, cell, permutation):
        assert (drawn.dtype, drawn.device.type) == (torch.int64, "meta")


def test_one_interval_for_all_is_filled_in_where_the_maps_are():
    block = TemporalFiLMGate(4).to("meta")
    with NothingFromTheHost():
        block(*(torch.empty(shape, device="meta") for shape in ((2, 4, 3, 3), (2, 4), (2, 2))), 7.0)


LAUNCHERS = sorted(Path(kernels.__file__).parent.glob("gpu/*.py"))
READING = {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "tensor", "as_tensor", "from_numpy", "synchronize"}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_no_launcher_asks_for_a_value_or_brings_one(path):
    """Where shapes stand for results, launchers do not run; so their source is read instead."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert {func.attr for func in calls if isinstance(func, ast.Attribute)} & READING == set()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0], device="meta"),
        lambda x: x + torch.arange(2.0).to("meta"),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: x[[1, 0]],
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: float(x.norm()) if x.any() else 0.0,
        lambda x: WeightedBlockFusion(3, 1).to("meta").selected,
    ],
)
def test_what_waits_is_seen(wait):
    with pytest.raises((Waits, RuntimeError, NotImplementedError)), NothingFromTheHost():
        wait(torch.empty(2, device="meta"))
