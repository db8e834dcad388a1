"""Fusion while maps are produced: values, gradients, and what stays in memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from block_maps import assert_near, maps
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trifuse.blocks.weighted_block_fusion import WeightedBlockFusion
from trifuse.kernels import ShapeError, weighted_block_fusion_reference

REL = {torch.float64: 1e-10, torch.float32: 1e-5}


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
    (grad,) = torch.autograd.grad(y.sum(), fusion.logits, create_graph=True)
    for parameter in (fusion.logits, projection.weight):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(grad.square().sum(), parameter, retain_graph=True)
