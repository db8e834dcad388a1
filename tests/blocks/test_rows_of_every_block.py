"""Rows of the matrix of faults that hold for every block alike."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_blocks import BLOCKS
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from trifuse.kernels import ShapeError


def of_maps(name: str) -> bool:
    """Whether a block is called with maps, first of all; `BatchNormOfPresent` is a norm, and checks what norms do."""
    return tree_leaves(BLOCKS[name].inputs(2))[0].ndim == 4 and name != "BatchNormOfPresent"


@pytest.mark.parametrize("name", [name for name in BLOCKS if of_maps(name)])
@pytest.mark.parametrize("other", [lambda x: x[0], lambda x: x.movedim(1, -1)], ids=["no batch", "channels last"])
def test_b3_b4_maps_of_another_layout_are_refused_with_the_one_expected(name, other):
    block = BLOCKS[name].make()
    leaves, tree = tree_flatten(BLOCKS[name].inputs(2))
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.ndim == 4:
            given = tree_unflatten([*leaves[:place], other(leaf), *leaves[place + 1 :]], tree)
            with pytest.raises(ShapeError, match=r"expected .*\("):
                block(*given)


def results(block: nn.Module, given: tuple) -> list[Tensor]:
    torch.manual_seed(4)
    return [x for x in tree_leaves(block(*given)) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", BLOCKS)
def test_b14_copies_pickles_and_shared_memory(name):
    block, given = BLOCKS[name].make().eval(), BLOCKS[name].inputs(2)
    expected = results(block, given)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), block.share_memory()):
        assert all(map(torch.equal, results(twin, given), expected))


@pytest.mark.parametrize("name", BLOCKS)
def test_b14_hooks_of_every_module_run(name):
    block, given = BLOCKS[name].make(), BLOCKS[name].inputs(2)
    modules = {path: module for path, module in block.named_modules() if not isinstance(module, nn.ModuleList)}
    ran: list[str] = []
    for path, module in modules.items():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    results(block, given)
    assert set(ran) == set(modules)
