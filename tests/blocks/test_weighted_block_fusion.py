"""The block that weighs, fuses and selects: values, gradients, selection, streaming."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trifuse.blocks.weighted_block_fusion import WeightedBlockFusion
from trifuse.kernels import ShapeError, TrifuseError, weighted_block_fusion_reference

REL = {torch.float64: 1e-10, torch.float32: 1e-5}


def maps(n, shape=(2, 5, 6), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(n)]


def with_logits(values, top_k=2, **options) -> WeightedBlockFusion:
    fusion = WeightedBlockFusion(len(values), top_k, **options)
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor(values))
    return fusion


def assert_near(got, wanted, relative):
    """Compare against the largest value, as gradients of many terms deserve."""
    assert got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= relative * wanted.abs().max(), (got, wanted)


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
    ("mode", "base", "selected"),
    [
        ("last4", 0, (11, 10, 9, 8)),
        ("fixed:[7,5,3,1]", 0, (7, 5, 3, 1)),
        ("fixed:[1, 3, 5, 7]", 0, (1, 3, 5, 7)),
        ("fixed:[8,6,4,2]", 1, (7, 5, 3, 1)),
        ("fixed:[12,1,12,1]", 1, (11, 0, 11, 0)),
    ],
)
def test_fixed_modes_take_the_list_as_it_is_written(mode, base, selected):
    fusion = WeightedBlockFusion(12, mode=mode, index_base=base)
    assert fusion.selected == selected
    assert fusion.logits is None
    assert not list(fusion.parameters())


def test_fixed_blocks_share_the_weight():
    weights = WeightedBlockFusion(12, mode="last4").weights
    assert weights.tolist() == [0.0] * 8 + [0.25] * 4


def test_fixed_modes_fuse_nothing():
    fusion = WeightedBlockFusion(4, mode="last4")
    for call in (lambda: fusion(maps(4)), lambda: fusion.stream(enumerate(maps(4)), {3}, torch.zeros(2, 6))):
        with pytest.raises(TrifuseError, match="mode 'last4' has no weights to fuse with"):
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
        ({"mode": "first4"}, r"unknown mode 'first4'; use 'learned', 'last4' or a list such as 'fixed:\[7,5,3,1\]'"),
        ({"mode": "fixed:[]"}, "unknown mode"),
        ({"mode": "fixed:[1,2,3,-1]"}, "unknown mode"),
        ({"mode": "fixed:[7,5,3,1]"}, r"asks for blocks \[7\] \(0-based\), but there are only 0 to 5"),
        ({"mode": "fixed:[3,2,1,0]", "index_base": 1}, r"asks for blocks \[-1\]"),
        ({"mode": "fixed:[3,2,1]"}, "selects 3 blocks, but top_k is 4"),
        ({"mode": "last4", "index_base": 2}, "index_base must be 0 or 1, got 2"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        WeightedBlockFusion(6, **options)


# --- streaming --------------------------------------------------------------------------------------------------------


def stored_and_streamed(n, shape, width, dtype, recompute, seed):
    """Return (value, logits' gradient, projection's gradient), and the kept maps, of both forms."""
    features = maps(n, shape, dtype, seed)
    fusion = WeightedBlockFusion(n, 1).to(dtype)
    with torch.no_grad():
        fusion.logits.copy_(torch.randn(n, generator=torch.Generator().manual_seed(seed)))
    projection = nn.Linear(shape[-1], width, bias=False).to(dtype)
    keep = set(range(0, n, 3))
    grad = torch.randn(*shape[:2], width, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))

    def results(y):
        return y, *torch.autograd.grad(y, [fusion.logits, projection.weight], grad)

    stored = results(projection(fusion(features)))
    again = (lambda: enumerate(features)) if recompute else None
    kept, y = fusion.stream(enumerate(features), keep, projection.weight, again)
    assert {index: features[index].data_ptr() for index in keep} == {i: kept[i].data_ptr() for i in kept}
    return stored, results(y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("recompute", [False, True])
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.integers(0, 9))
def test_streaming_equals_stored(dtype, recompute, n, b, m, d, width, seed):
    stored, streamed = stored_and_streamed(n, (b, m, d), width, dtype, recompute, seed)
    assert_near(streamed[0], stored[0], REL[dtype])
    assert_near(streamed[2], stored[2], REL[dtype])
    # The logits' gradient is a difference of products that cancel where N = 1.
    scale = max(1.0, stored[1].abs().max().item()) * b * m * d
    assert (streamed[1] - stored[1]).abs().max() <= REL[dtype] * scale


@pytest.mark.parametrize("recompute", [False, True])
def test_streaming_gradient_is_that_of_finite_differences(recompute):
    features, fusion = maps(4), WeightedBlockFusion(4, 1).double()
    logits, weight = fusion.logits.detach().clone().requires_grad_(), torch.randn(3, 6).double().requires_grad_()
    del fusion.logits

    def fused(logits, weight):
        fusion.logits = logits
        again = (lambda: enumerate(features)) if recompute else None
        return fusion.stream(enumerate(features), set(), weight, again)[1]

    assert torch.autograd.gradcheck(fused, (logits, weight))


def test_streaming_in_bfloat16_maps_and_float32_weights():
    features = [tokens.bfloat16() for tokens in maps(6, dtype=torch.float32)]
    fusion, projection = WeightedBlockFusion(6, 1), nn.Linear(6, 3, bias=False)
    stored = projection(weighted_block_fusion_reference(features, fusion.logits).float())
    _, streamed = fusion.stream(enumerate(features), set(), projection.weight)
    assert torch.equal(stored, streamed)
    assert {saved.dtype for saved in streamed.grad_fn.saved_tensors[2:]} == {torch.bfloat16}, "no wider than the maps"
    wanted = torch.autograd.grad(stored.square().sum(), [fusion.logits, projection.weight])
    got = torch.autograd.grad(streamed.square().sum(), [fusion.logits, projection.weight])
    assert_near(got[0], wanted[0], 2e-2)
    assert_near(got[1], wanted[1], 2e-2)


@pytest.mark.parametrize("recompute", [False, True])
def test_streaming_under_autocast(recompute):
    features = maps(6, dtype=torch.float32)
    fusion, projection = WeightedBlockFusion(6, 1), nn.Linear(6, 3, bias=False)
    states = []

    def again():
        states.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return enumerate(features)

    with torch.autocast("cpu", torch.bfloat16):
        stored = projection(fusion(features))
        _, streamed = fusion.stream(enumerate(features), set(), projection.weight, again if recompute else None)
    assert torch.equal(stored, streamed)
    assert streamed.dtype == torch.bfloat16
    wanted = torch.autograd.grad(stored.float().square().sum(), [fusion.logits, projection.weight])
    got = torch.autograd.grad(streamed.float().square().sum(), [fusion.logits, projection.weight])
    assert_near(got[0], wanted[0], 4e-2)
    assert_near(got[1], wanted[1], 2e-2)
    assert states == ([(True, False)] if recompute else []), (
        "the second pass computes as the first did, and records nothing"
    )


def test_streaming_with_frozen_logits_or_a_frozen_projection():
    features = maps(4)
    for frozen in ("logits", "projection"):
        fusion, projection = WeightedBlockFusion(4, 1).double(), nn.Linear(6, 3, bias=False).double()
        (fusion.logits if frozen == "logits" else projection.weight).requires_grad_(False)
        _, y = fusion.stream(enumerate(features), set(), projection.weight)
        y.square().sum().backward()
        assert (fusion.logits.grad is None) == (frozen == "logits")
        assert (projection.weight.grad is None) == (frozen == "projection")


@pytest.mark.parametrize("case", ["no_grad", "frozen logits", "recompute", "project"])
def test_streaming_holds_one_map_at_a_time_beside_the_kept_ones(case):
    fusion, projection = WeightedBlockFusion(6, 1), nn.Linear(6, 3, bias=False)
    fusion.logits.requires_grad_(case != "frozen logits")
    alive, most = weakref.WeakSet(), []

    def produce():
        for index, tokens in enumerate(maps(6, dtype=torch.float32)):
            fresh = tokens.clone()
            alive.add(fresh)
            most.append(len(alive))
            yield index, fresh
            del fresh

    with torch.set_grad_enabled(case != "no_grad"):
        kept, y = fusion.stream(produce(), {1, 4}, projection.weight, produce if case == "recompute" else None)
    gc.collect()
    assert sorted(kept) == [1, 4]
    assert len(alive) == 2
    assert most == [1, 1, 2, 2, 2, 3], "maps in memory when each block has made its own, blocks 1 and 4 kept"
    assert y.requires_grad == (case != "no_grad")
    if case in ("recompute", "project"):
        assert len(y.grad_fn.saved_tensors) == 3 + (6 if case == "project" else 0), "logits, weight, fused; projections"


def test_streaming_without_a_projection_only_keeps():
    features = maps(3)
    kept, fused = WeightedBlockFusion(3, 1).stream(enumerate(features), {2}, None)
    assert list(kept) == [2]
    assert kept[2] is features[2]
    assert fused is None


@pytest.mark.parametrize("given_maps", [0, 3])
def test_streaming_wants_every_block(given_maps):
    with pytest.raises(ShapeError, match=f"expected the maps of all 4 blocks, got {given_maps}"):
        WeightedBlockFusion(4).double().stream(enumerate(maps(given_maps)), set(), torch.zeros(2, 6).double())


def test_streaming_cannot_be_differentiated_twice():
    fusion, projection = WeightedBlockFusion(3, 1).double(), nn.Linear(6, 2, bias=False).double()
    _, y = fusion.stream(enumerate(maps(3)), set(), projection.weight)
    (grad,) = torch.autograd.grad(y.square().sum(), fusion.logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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
