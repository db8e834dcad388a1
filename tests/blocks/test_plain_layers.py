"""Whatever is done to a convolution or a linear layer of a block acts, although fused paths read weights directly."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from changed_layers import CHANGES, SILENT, Adapter, hooked_with_a_term, layers_of, parts_of, quantised, rounded
from compiling import assert_compiles
from tiny_blocks import BLOCKS, in_float64
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trifuse.blocks import ContextAwareFusion
from trifuse.blocks.plain_layers import dtype_of, is_plain
from trifuse.blocks.plain_unet import ConvUnit
from trifuse.kernels import backend
from trifuse.kernels.testing import launches

WITH_LAYERS = [name for name, block in BLOCKS.items() if any(layers_of(block.make()))]
FUSED = [name for name in WITH_LAYERS if BLOCKS[name].fused]
FUSIONS = {
    f"ContextAwareFusion {options}": lambda options=options: ContextAwareFusion(4, **options)
    for options in ({"spatial_pool": "none"}, {"spatial_pool": "local3"}, {"max_pool": False})
}
MAKERS = {name: BLOCKS[name].make for name in WITH_LAYERS} | FUSIONS


def made(name: str) -> tuple[nn.Module, tuple]:
    """A block whose layers all count, in float64, and its input."""
    torch.manual_seed(0)
    block = MAKERS[name]().double()
    with torch.no_grad():  # a last layer of zeros hides what is before it
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block, in_float64(BLOCKS[name.split(" {")[0]].inputs(2))


def result_of(block: nn.Module, given: tuple) -> Tensor:
    """All that a block returns, with the draws of one seed, as one vector."""
    torch.manual_seed(4)
    return torch.cat([x.flatten() for x in tree_leaves(block(*given)) if isinstance(x, Tensor)])


def loss_of(block: nn.Module, given: tuple) -> Tensor:
    result = result_of(block, given)
    return (result * torch.linspace(-1, 2, len(result)).to(result)).sum()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MAKERS)
def test_b16_what_is_done_to_every_layer_acts_and_trains(name, change):
    block, given = made(name)
    before = result_of(block.eval(), given)
    learned = {path: CHANGES[change](parent, layer) for path, parent, layer in layers_of(block)}
    torch.testing.assert_close(result_of(block, given), before) if change in SILENT else None
    assert change in SILENT or not torch.allclose(result_of(block, given), before)

    block.train()
    optimiser = torch.optim.SGD(block.parameters(), 0.01)
    for _ in range(2):
        optimiser.zero_grad()
        loss_of(block, given).backward()
        without = [path for path, parameter in learned.items() if parameter.grad is None or not parameter.grad.any()]
        assert not without
        optimiser.step()


@pytest.mark.parametrize("name", MAKERS)
def test_b16_a_hook_of_any_part_acts(name):
    """Of every module that a block holds: none is taken apart while something hangs on it."""
    block, given = made(name)
    before = result_of(block.eval(), given)
    for path, part in parts_of(block):
        with hooked_with_a_term(part):
            assert not torch.allclose(result_of(block, given), before), path


@pytest.mark.parametrize("name", MAKERS)
def test_b16_what_stands_in_the_place_of_any_part_acts(name):
    """A block asks its parts for nothing that a module in their place need not have."""
    block, given = made(name)
    before = result_of(block.eval(), given)
    for path, part in parts_of(block):
        put(block, path, Wrapped(part))
        assert not torch.allclose(result_of(block, given), before), path
        put(block, path, part)


def put(block: nn.Module, path: str, part: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    block.get_submodule(holder)._modules[name] = part


class Wrapped(nn.Module):
    """Stands in the place of any part, whatever that is called with and returns, and shows nothing of it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *given: Any, **options: Any) -> Any:
        with hooked_with_a_term(self.part):
            return self.part(*given, **options)


@pytest.mark.parametrize("name", [*FUSED, *FUSIONS])
def test_b16_a_block_computes_the_same_by_calling_any_of_its_layers(name):
    """Each in turn alone: values and every gradient are those of the fused path."""
    block, given = made(name)
    loss_of(block, given).backward()
    expected = {path: parameter.grad.clone() for path, parameter in block.named_parameters()}
    result = result_of(block, given)
    for path, parent, layer in list(layers_of(block)):
        plain = getattr(parent, layer)
        setattr(parent, layer, Adapter(plain, size=0.0))
        torch.testing.assert_close(result_of(block, given), result, msg=lambda text, path=path: f"{path}: {text}")
        block.zero_grad()
        loss_of(block, given).backward()
        setattr(parent, layer, plain)
        for of, parameter in block.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[of], msg=lambda text, p=path: f"{p} called: {text}")


@pytest.mark.parametrize("name", MAKERS)
def test_b16_layers_without_parameters_are_called(name):
    block, given = (x.float() if isinstance(x, nn.Module) else x for x in made(name))
    given = BLOCKS[name.split(" {")[0]].inputs(2)
    before = result_of(block.eval(), given)
    for _, parent, layer in list(layers_of(block)):
        rounded(parent, layer)
    assert not torch.allclose(result_of(block, given), before)


LINEAR = [name for name in MAKERS if any(type(part) is nn.Linear for part in MAKERS[name]().modules())]


@pytest.mark.parametrize("name", LINEAR)
def test_b16_dynamic_quantisation_acts(name):
    block, given = (x.float() if isinstance(x, nn.Module) else x for x in made(name))
    given = BLOCKS[name.split(" {")[0]].inputs(2)
    before = result_of(block.eval(), given)
    after = result_of(quantised(block), given)
    assert 0 < (after - before).norm() < 0.1 * before.norm()


READING = ["ContextAwareFusion", "DepthwiseMultiKernel", "DilatedAttention", "MixingAttention", "MonteCarloAttention"]
READING += ["TransformerBlock"]
"""The blocks that read weights of their layers."""


@pytest.mark.parametrize("name", READING)
def test_b16_with_adapters_it_is_one_graph_still(name):
    block, given = made(name)
    for _, parent, layer in list(layers_of(block)):
        setattr(parent, layer, Adapter(getattr(parent, layer)))
    assert_compiles(block.eval(), lambda block, given: block(*given), [given], graphs=1, backend="eager")


@pytest.mark.parametrize("change", CHANGES)
def test_b16_a_changed_layer_is_not_plain_and_is_again_without_the_change(change):
    parent = nn.Sequential(nn.Linear(3, 2).bfloat16())
    assert is_plain(parent[0])
    CHANGES[change](parent, "0")
    assert not is_plain(parent[0])
    assert dtype_of(parent[0]) is torch.bfloat16


def doubled_by_a_hook(unit: ConvUnit) -> None:
    unit.norm.register_forward_hook(lambda norm, given, result: 2 * result)


def doubled_by_its_forward(unit: ConvUnit) -> None:
    forward = unit.norm.forward
    unit.norm.forward = lambda x: 2 * forward(x)


def doubled_in_its_place(unit: ConvUnit) -> None:
    unit.norm = Doubled(unit.norm)


class Doubled(nn.Module):
    """Stands in a norm's place, and shows its weight and bias."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.weight, self.bias, self.eps = norm, norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.norm(x)


@pytest.mark.parametrize("change", [doubled_by_a_hook, doubled_by_its_forward, doubled_in_its_place])
@pytest.mark.parametrize("means", [None, []])
def test_b16_what_is_done_to_a_norm_acts_before_the_rectifier(change, means):
    """And the rectifier writes over nothing that a hook may hold."""
    unit = ConvUnit(2, 3).double()
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    norm, plain = unit.norm, unit(x, means)
    change(unit)
    held: list[Tensor] = []
    unit.norm.register_forward_hook(lambda norm, given, result: held.append(result))
    torch.testing.assert_close(unit(x, means), 2 * plain)
    torch.testing.assert_close(held[0], 2 * nn.functional.group_norm(unit.conv(x), 3, norm.weight, norm.bias))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
def test_a_plain_norm_and_its_rectifier_are_one_launch():
    unit, x = ConvUnit(2, 3), torch.randn(2, 2, 4, 5)
    with backend("triton"), launches() as counted:
        unit(x)
        unit(x, [])
    assert counted.kernels == {"_held_fwd_kernel": 2}


def test_asking_whether_a_layer_is_plain_costs_few_calls():
    """Each is some 50 ns of the host's time; walking over parameters as `Module.parameters` does would be a dozen."""
    calls: list[str] = []
    layers = nn.Conv2d(3, 2, 1), nn.LayerNorm(3)
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        is_plain(*layers)
    finally:
        sys.setprofile(None)
    assert calls == ["is_plain", *["as_its_class_says", "has_hooks", "own_parameters"] * 2]


def test_a_removed_hook_leaves_a_layer_plain():
    layer = nn.Conv2d(3, 2, 1)
    handle = layer.register_full_backward_hook(lambda *_: None)
    assert not is_plain(layer)
    handle.remove()
    assert is_plain(layer)


def test_a_weight_that_computes_in_its_own_way_is_not_plain():
    """Quantisation may leave the layer and replace its weight by a tensor of another class."""

    class Quantised(Tensor):
        def __tensor_flatten__(self):
            return [], None

    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    assert not is_plain(layer)


def test_b16_a_layer_of_whole_numbers_computes_in_the_type_of_its_scales():
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    assert dtype_of(layer) is torch.float32
    layer.scale = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert dtype_of(layer) is torch.bfloat16
