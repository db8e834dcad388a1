"""The temporal FiLM gate's block: its equations and gradients, the forms of an interval, and what it is at first."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trifuse.blocks import TemporalFiLMGate
from trifuse.kernels import ShapeError, temporal_film_gate


def random_block(dim=5, dtype=torch.float64, **options):
    block = TemporalFiLMGate(dim, **options).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return block


def random_arguments(batch=3, dim=5, size=(4, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, dim, *size), (batch, dim), (batch, 2)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def by_the_equations(block, features, ecg, weights, days):
    """Mix, modulate and add step by step, with the ECG's vector as a whole map."""
    t = (days / block.max_days).clamp(0, 1).view(-1, 1)
    gamma, beta = block.mlp.second(block.mlp.first(t).relu()).chunk(2, dim=1)
    ecg_map = ecg[:, :, None, None].expand_as(features)
    w_mri, w_ecg = weights[:, :, None, None, None].unbind(1)
    mixed = features * w_mri + ecg_map * w_ecg
    return features + mixed * (1 + gamma[..., None, None]) + beta[..., None, None]


def test_parameters_are_the_published_number():
    assert sum(parameter.numel() for parameter in TemporalFiLMGate(256).parameters()) == 33_408


def test_result_and_gradients_are_the_equations():
    block, arguments = random_block(), random_arguments()
    days = torch.tensor([3.0, 45.0, 200.0], dtype=torch.float64)
    leaves = [*arguments, *block.parameters()]
    results = [block(*arguments, days), by_the_equations(block, *arguments, days)]
    torch.testing.assert_close(*results)
    grad = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(result, leaves, grad) for result in results))


def test_time_changes_nothing_at_first():
    block, arguments = TemporalFiLMGate(5), random_arguments(dtype=torch.float32)
    nothing = torch.zeros(2, 3, 5)
    for days in (0, 17, 90):
        assert torch.equal(block(*arguments, days), temporal_film_gate(*arguments, *nothing))


@given(days=st.integers(-5, 200))
def test_b11_one_interval_in_every_form(days):
    block, arguments = random_block(), random_arguments()
    expected = by_the_equations(block, *arguments, torch.full((3,), days, dtype=torch.float64))
    whole = torch.full((3,), days)
    for form in (days, float(days), torch.tensor(days), whole, whole[:, None], whole.to(torch.float32)):
        torch.testing.assert_close(block(*arguments, form), expected)


def test_intervals_are_cut_to_the_longest():
    block, arguments = random_block(max_days=30), random_arguments()
    assert torch.equal(block(*arguments, 30), block(*arguments, 31))
    assert torch.equal(block(*arguments, -4), block(*arguments, 0))
    assert not torch.allclose(block(*arguments, 15), block(*arguments, 30))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 3), (3, 1, 1)], ids=str)
def test_refuses_other_intervals(shape):
    with pytest.raises(ShapeError, match=r"interval has shape \(.*\); expected \(3,\) or \(3, 1\)"):
        random_block()(*random_arguments(), torch.zeros(shape))


def test_modulation_is_computed_in_float32_whatever_runs_around_it():
    block, (features, ecg, weights) = random_block(dtype=torch.float32), random_arguments(dtype=torch.float32)
    expected = block(features, ecg, weights, 31)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(features, ecg, weights, 31), expected)
    low = block.to(torch.bfloat16)
    exact = copy.deepcopy(low).to(torch.float32)
    assert torch.equal(low(features, ecg, weights, 31), exact(features, ecg, weights, 31))


def test_half_precision_maps_stay_in_their_type():
    features, ecg, weights = random_arguments(dtype=torch.float32)
    assert random_block(dtype=torch.float32)(features.bfloat16(), ecg, weights, 31).dtype == torch.bfloat16


def test_weights_are_drawn_as_linear_layers_draw_them():
    first, second = (TemporalFiLMGate(5, hidden=4096) for _ in range(2))
    for block in (first, second):
        block.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(first.mlp.first.weight, second.mlp.first.weight)
    for drawn in (first.mlp.first.weight, first.mlp.first.bias):
        assert 0.99 < drawn.abs().max() <= 1
        assert abs(drawn.mean()) < 0.05
    assert not first.mlp.second.weight.any()
    assert not first.mlp.second.bias.any()


def test_b13_b14_copies_and_state(tmp_path):
    block, arguments = random_block(), random_arguments()
    expected = block(*arguments, 31)
    stream = io.BytesIO()
    torch.save(block.state_dict(), stream)
    stream.seek(0)
    loaded = TemporalFiLMGate(5).double()
    loaded.load_state_dict(torch.load(stream), strict=True)
    for twin in (copy.deepcopy(block), loaded):
        assert torch.equal(twin(*arguments, 31), expected)
