"""The block that weighs, fuses and selects: values, gradients, selection."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from block_maps import maps
from hypothesis import given
from hypothesis import strategies as st

from trifuse.blocks.weighted_block_fusion import WeightedBlockFusion
from trifuse.kernels import TrifuseError


def with_logits(values, top_k=2, **options) -> WeightedBlockFusion:
    fusion = WeightedBlockFusion(len(values), top_k, **options)
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor(values))
    return fusion


# --- values and gradients ---------------------------------------------------------------------------------------------


def test_matches_definition():
    features = maps(5)
    fusion = WeightedBlockFusion(5).double()
    expected = sum(torch.exp(fusion.logits[i]) * features[i] for i in range(5)) / torch.exp(fusion.logits).sum()
    torch.testing.assert_close(fusion(features), expected)
    torch.testing.assert_close(fusion(torch.stack(features)), expected)


def test_gradient_of_the_logits():
    features, fusion = maps(5), WeightedBlockFusion(5).double()
    grad = torch.randn(2, 5, 6, dtype=torch.float64)
    fusion(features).backward(grad)
    w = fusion.weights.detach()
    s = torch.stack([(grad * tokens).sum() for tokens in features])
    torch.testing.assert_close(fusion.logits.grad, w * (s - (w * s).sum()))
    assert fusion.logits.grad.sum().abs() < 1e-12


def test_starts_near_uniform():
    fusion = WeightedBlockFusion(10_000)
    assert fusion.logits.std().item() == pytest.approx(0.01, rel=0.05)
    assert fusion.logits.mean().abs() < 5e-4
    assert (fusion.weights * 10_000 - 1).abs().max() < 0.06


def test_initial_logits_follow_the_generator():
    first, second = WeightedBlockFusion(4), WeightedBlockFusion(4)
    for fusion in (first, second):
        fusion.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(first.logits, second.logits)


def test_weights_are_differentiable_and_at_least_float32():
    fusion = WeightedBlockFusion(4).to(torch.bfloat16)
    assert fusion.weights.dtype == torch.float32
    fusion.weights[0].backward()
    assert fusion.logits.grad.abs().sum() > 0


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "order", "selected"),
    [
        ([0.0, 3.0, 1.0, 2.0], "depth", (3, 1)),
        ([0.0, 3.0, 1.0, 2.0], "weight", (1, 3)),
        ([0.0, 0.0, 0.0, 0.0], "depth", (1, 0)),
        ([0.0, 0.0, 0.0, 0.0], "weight", (0, 1)),
        ([1.0, 2.0, 2.0, 2.0], "weight", (1, 2)),
        ([1.0, 2.0, 1.0, 1.0], "depth", (1, 0)),
    ],
)
def test_selected_with_ties_to_the_lower_index(logits, order, selected):
    assert with_logits(logits, order=order).selected == selected


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_selected_against_a_sort(values, data):
    k = data.draw(st.integers(1, len(values)))
    heaviest = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    floats = [float(value) for value in values]
    assert with_logits(floats, k, order="weight").selected == tuple(heaviest)
    assert with_logits(floats, k, order="depth").selected == tuple(sorted(heaviest, reverse=True))


def test_selection_follows_the_logits_in_train_and_eval():
    fusion = with_logits([0.0, 1.0, 2.0, 3.0])
    assert fusion.selected == (3, 2)
    for mode in (True, False):
        fusion.train(mode)
        with torch.no_grad():
            fusion.logits.copy_(-fusion.logits)
        assert fusion.selected == ((1, 0) if mode else (3, 2))


def test_frozen_selection_stays_and_is_saved():
    fusion = with_logits([0.0, 3.0, 1.0, 2.0], order="weight")
    fusion.freeze_selection()
    with torch.no_grad():
        fusion.logits.neg_()
    assert fusion.selected == (1, 3)
    other = WeightedBlockFusion(4, 2, order="weight")
    other.load_state_dict(fusion.state_dict())
    assert other.selected == (1, 3)


@pytest.mark.parametrize(
    ("blocks", "base", "selected"),
    [
        ("last4", 0, (11, 10, 9, 8)),
        ((7, 5, 3, 1), 0, (7, 5, 3, 1)),
        ((1, 3, 5, 7), 0, (1, 3, 5, 7)),
        ((8, 6, 4, 2), 1, (7, 5, 3, 1)),
        ((12, 1, 12, 1), 1, (11, 0, 11, 0)),
    ],
)
def test_fixed_blocks_are_taken_in_the_order_of_their_list(blocks, base, selected):
    fusion = WeightedBlockFusion(12, blocks=blocks, index_base=base)
    assert fusion.selected == selected
    assert fusion.logits is None
    assert not list(fusion.parameters())


def test_fixed_blocks_share_the_weight():
    weights = WeightedBlockFusion(12, blocks="last4").weights
    assert weights.tolist() == [0.0] * 8 + [0.25] * 4


def test_fixed_blocks_fuse_nothing():
    fusion = WeightedBlockFusion(4, blocks="last4")
    for call in (lambda: fusion(maps(4)), lambda: fusion.stream(enumerate(maps(4)), {3}, torch.zeros(2, 6))):
        with pytest.raises(TrifuseError, match="fixed blocks 'last4' have no weights to fuse with; use blocks=None"):
            call()


# --- K34 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_k34_k_out_of_bounds(top_k):
    with pytest.raises(ValueError, match=f"top_k must be from 1 to the 4 blocks, got {top_k}"):
        WeightedBlockFusion(4, top_k)


def test_k34_one_block():
    fusion, features = WeightedBlockFusion(1, 1).double(), maps(1)
    fused = fusion(features)
    fused.sum().backward()
    torch.testing.assert_close(fused, features[0])
    assert fusion.logits.grad.tolist() == [0.0]
    assert fusion.selected == (0,)


def test_k34_equal_logits_are_uniform():
    fusion = with_logits([7.0] * 5).double()
    assert fusion.weights.tolist() == [pytest.approx(0.2)] * 5
    torch.testing.assert_close(fusion(maps(5)), torch.stack(maps(5)).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k34_extreme_logits(dtype):
    fusion, features = with_logits([1e4, -1e4, 1e4, 0.0]).to(dtype), maps(4, dtype=dtype)
    fused = fusion(features)
    fused.sum().backward()
    torch.testing.assert_close(fused, (features[0] + features[2]) / 2)
    assert fusion.selected == (2, 0)
    assert fusion.logits.grad.isfinite().all()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "random"}, "order: expected one of 'depth', 'weight', got 'random'"),
        ({"blocks": "first4"}, r"such as \[7, 5, 3, 1\], 'last4', or None for a learned selection, got 'first4'"),
        ({"blocks": ()}, r"blocks \[\] selects 0 blocks, but top_k is 4"),
        ({"blocks": (1, 2, 3, -1)}, r"asks for blocks \[-1\]"),
        ({"blocks": (7, 5, 3, 1)}, r"asks for blocks \[7\] \(0-based\), but there are only 0 to 5"),
        ({"blocks": (3, 2, 1, 0), "index_base": 1}, r"asks for blocks \[-1\]"),
        ({"blocks": (3, 2, 1)}, "selects 3 blocks, but top_k is 4"),
        ({"blocks": "last4", "index_base": 2}, "index_base must be 0 or 1, got 2"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        WeightedBlockFusion(6, **options)


# --- as a module ------------------------------------------------------------------------------------------------------


def test_b13_state_dict_loads_strictly_both_ways():
    first, second = WeightedBlockFusion(5), WeightedBlockFusion(5)
    assert sorted(first.state_dict()) == ["frozen_selection", "logits"]
    second.load_state_dict(first.state_dict(), strict=True)
    first.load_state_dict(second.state_dict(), strict=True)
    assert second.selected == first.selected


def test_b14_copies_pickles_shared_memory_and_hooks():
    features, fusion = maps(4), WeightedBlockFusion(4).double()
    for twin in (copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion)), copy.deepcopy(fusion).share_memory()):
        assert torch.equal(twin(features), fusion(features))
    seen = []
    fusion.register_forward_hook(lambda module, arguments, result: seen.append(result.shape))
    fusion(features)
    assert seen == [(2, 5, 6)]
