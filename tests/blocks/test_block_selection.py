"""Which blocks are selected, and how their maps are collected."""

from __future__ import annotations

import pytest
import torch
from block_maps import maps

from trifuse.blocks import block_selection
from trifuse.blocks.block_selection import SelectedMaps, fixed_blocks, heaviest_blocks


@pytest.mark.parametrize(
    ("blocks", "base", "indices"),
    [(None, 0, None), ("last4", 1, (5, 4, 3, 2)), ([3, 0], 0, (3, 0)), (range(6, 0, -2), 1, (5, 3, 1)), ([], 0, ())],
)
def test_fixed_blocks_are_0_based(blocks, base, indices):
    assert fixed_blocks(blocks, 6, base) == indices


@pytest.mark.parametrize("order", ["depth", "weight"])
def test_heaviest_blocks_are_integers_without_a_gradient(order):
    heaviest = heaviest_blocks(torch.tensor([0.0, 3.0, 1.0, 2.0], requires_grad=True), 2, order)
    assert heaviest.tolist() == ([3, 1] if order == "depth" else [1, 3])
    assert heaviest.dtype == torch.int64
    assert not heaviest.requires_grad


@pytest.mark.parametrize("fixed", [None, (4, 0, 2)])
def test_selected_maps_are_the_maps_themselves(fixed):
    features = maps(5)
    selected = SelectedMaps(torch.tensor([4, 0, 2]), 5, fixed)
    passed = list(selected.collect_from(enumerate(features)))
    assert all(index == i and tokens is features[i] for i, (index, tokens) in enumerate(passed))
    assert len(passed) == 5
    assert selected.known == (4, 0, 2)
    assert all(got is features[i] for got, i in zip(selected.collected(), (4, 0, 2), strict=True))


def test_selected_maps_are_copied_where_the_selection_cannot_be_read(monkeypatch):
    monkeypatch.setattr(block_selection, "values_at_hand", lambda tensors: False)
    features = [tokens.requires_grad_() for tokens in maps(5)]
    selected = SelectedMaps(torch.tensor([4, 0, 2]), 5)
    assert len(list(selected.collect_from(enumerate(features)))) == 5
    assert selected.known is None
    for got, i in zip(selected.collected(), (4, 0, 2), strict=True):
        assert torch.equal(got, features[i])
        assert not got.requires_grad
