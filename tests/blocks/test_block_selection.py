"""Which blocks are selected, and how their maps are collected."""

from __future__ import annotations

import pytest
import torch
from block_maps import maps
from torch.utils._pytree import tree_leaves

from trifuse.blocks import WeightedBlockFusion, block_selection
from trifuse.blocks.block_selection import SelectedMaps, fixed_blocks, heaviest_blocks
from trifuse.kernels.torch_internals import TorchDispatchMode


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


def test_selected_maps_of_a_fusion_are_the_maps_themselves():
    features, logits = maps(5), torch.zeros(5)
    selected = SelectedMaps(torch.tensor([4, 0, 2]), 5)
    fused = selected.fuse(features, logits)
    torch.testing.assert_close(fused, torch.stack(features).mean(0))
    assert all(got is features[i] for got, i in zip(selected.collected(), (4, 0, 2), strict=True))


@pytest.mark.parametrize("stacked", [False, True])
def test_selected_maps_are_written_by_the_fusion_where_the_selection_cannot_be_read(monkeypatch, stacked):
    monkeypatch.setattr(block_selection, "values_at_hand", lambda tensors: False)
    features, logits = maps(5), torch.zeros(5)
    selected = SelectedMaps(torch.tensor([4, 0, 2]), 5)
    fused = selected.fuse(torch.stack(features) if stacked else features, logits)
    torch.testing.assert_close(fused, torch.stack(features).mean(0))
    assert len(selected.collected()) == 3
    for got, i in zip(selected.collected(), (4, 0, 2), strict=True):
        assert torch.equal(got, features[i])
        assert got is not features[i]


class MapPasses(TorchDispatchMode):
    """Count how many maps the operations inside the block read and write; all else is smaller than a map."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.count, self._elements = 0, elements

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_copy_.default:
            self.count += 2  # the source, and as much of the destination
        elif not func.is_view and func is not torch.ops.aten.new_empty.default:
            sizes = [leaf.numel() for leaf in tree_leaves((args, results)) if isinstance(leaf, torch.Tensor)]
            self.count += sum(size // self._elements for size in sizes)
        return results


@pytest.mark.parametrize(("num_blocks", "forward", "iterating"), [(12, 17, 37), (40, 45, 121)])
def test_passes_over_maps_where_the_selection_cannot_be_read(num_blocks, forward, iterating):
    """On the meta device, as on a GPU: base and giant with four stages, trained on frozen maps."""
    with torch.device("meta"):
        fusion = WeightedBlockFusion(num_blocks, 4)
        features = [torch.empty(2, 16, 64) for _ in range(num_blocks)]
    selected = fusion.selected_maps()
    with MapPasses(features[0].numel()) as passes:
        fused = fusion(features, selected)
    assert passes.count == forward == num_blocks + 1 + 4
    assert [got.shape for got in selected.collected()] == [(2, 16, 64)] * 4
    grad = torch.empty_like(fused)
    with MapPasses(features[0].numel()) as passes:
        torch.autograd.grad(fused, fusion.logits, grad)
    assert passes.count == num_blocks + 1
    with MapPasses(features[0].numel()) as passes:
        fusion(features)
        list(fusion.selected_maps().collect_from(enumerate(features)))
    assert passes.count == iterating == 3 * num_blocks + 1
