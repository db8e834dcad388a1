"""What PyTorch's compiler takes for granted of every registered operator, forward and backward.

Inductor allocates nothing for the results of an operator that it does not know; it trusts the shape rule for their
strides, takes each for memory of its own, and generates loads of 16 bytes where the rule's offset allows them.
"""

from __future__ import annotations

import pytest
import torch
from operator_calls import OPERATORS, calls_of, recorded, registered_names
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from trifuse.kernels import library

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the calls are on a CPU, where kernels are interpreted"
)
ALIGNMENT_BYTES = 16
SHAPES = ((1, 3, 5, 7), (1, 2, 2, 3), (1, 1, 1, 1), (3, 5, 3, 2))


@pytest.fixture(autouse=True)
def _nothing_is_launched(monkeypatch):
    """Kernels compute nothing and memory is zeros: what is asked here does not depend on values."""
    monkeypatch.setattr("trifuse.kernels.gpu.launching.launch", lambda *arguments, **settings: None)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, allocate=allocate, **k: allocate(*a, **k).detach().zero_())


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def all_recorded(op, shape, channels_last=False):
    return [one for call in calls_of(op, shape, channels_last=channels_last) for one in recorded(call)]


def like(tensor):
    """Return a tensor of the same layout without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@interpreted
def test_the_calls_reach_everything_that_is_registered():
    names = registered_names()
    assert set(OPERATORS) == library._registered
    assert {one.name for op in OPERATORS for one in all_recorded(op, SHAPES[1])} == names


@interpreted
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_results_are_memory_of_their_own_laid_out_as_the_shape_rule_says(op, shape, channels_last):
    for one in all_recorded(op, shape, channels_last):
        results, given = tensors(one.result), tensors(one.arguments)
        rule = tensors(one.overload(*tree_map_only(Tensor, like, one.arguments)))
        assert len(rule) == len(results), one.name
        storages, of_given = ([t.untyped_storage().data_ptr() for t in some if t.numel()] for some in (results, given))
        assert len(set(storages)) == len(storages), f"{one.name}: results share memory"
        assert not set(storages) & set(of_given), f"{one.name}: an argument comes back"
        for i, (result, expected) in enumerate(zip(results, rule, strict=True)):
            where = f"{one.name}, result {i} of shape {tuple(result.shape)}"
            assert (result.shape, result.dtype) == (expected.shape, expected.dtype), where
            assert result.stride() == expected.stride(), where
            assert result.storage_offset() * result.itemsize % ALIGNMENT_BYTES == 0, where
            assert result.data_ptr() % ALIGNMENT_BYTES == 0, where


@interpreted
@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op):
    for one in all_recorded(op, SHAPES[0]):
        differentiable = not one.name.endswith("_backward")  # a gradient has none of its own
        for grad in (False, True) if differentiable else (False,):
            copies = tree_map_only(
                Tensor, lambda t, g=grad: t.detach().clone().requires_grad_(g and t.is_floating_point()), one.arguments
            )
            torch.library.opcheck(one.overload, copies)
