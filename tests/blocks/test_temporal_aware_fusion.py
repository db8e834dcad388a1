"""Temporal-aware fusion: the equations, every gradient, samples without an ECG, intervals, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from trifuse.blocks import TemporalAwareFusion
from trifuse.kernels import ShapeError, backend

NAN = float("nan")
OPTIONS = [
    {},
    {"time": False},
    {"gate_sees_time": True},
    {"spatial_mlp": 2},
    {"spatial_mlp": 3, "time": False},
    {"max_days": 30.0},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch", "reference")


def random_block(dim=4, ecg_dim=6, dtype=torch.float64, **options):
    block = TemporalAwareFusion(dim, ecg_dim, **options).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return block


def random_arguments(batch=3, dim=4, ecg_dim=6, size=(5, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, dim, *size, generator=generator, dtype=dtype).requires_grad_()
    code = torch.randn(batch, ecg_dim, generator=generator, dtype=dtype).requires_grad_()
    return features, code, 100 * torch.rand(batch, generator=generator, dtype=dtype)


def by_the_equations(block, features, code, days):
    """The block's equations for samples that all have an ECG, step by step; the ECG's share is a whole map."""
    p = F.linear(code, block.projection.weight, block.projection.bias)
    if block.spatial_mlp is None:
        ecg_map = p[:, :, None, None].expand_as(features)
    else:
        grid = p.view(len(p), block.dim, block.spatial_mlp, block.spatial_mlp)
        ecg_map = F.interpolate(grid, features.shape[2:], mode="bilinear", align_corners=False)
    seen = [F.adaptive_avg_pool2d(features, 1).flatten(1), code]
    gamma = beta = torch.zeros(*features.shape[:2], dtype=features.dtype)
    if block.film is not None:
        t = (days[:, None] / block.film.max_days).clamp(0, 1)
        mlp = block.film.mlp
        both = F.linear(F.linear(t, mlp.first.weight, mlp.first.bias).relu(), mlp.second.weight, mlp.second.bias)
        gamma, beta = both.chunk(2, dim=1)
        seen += [t] if block.gate_sees_time else []
    gate = block.gate
    hidden = F.linear(torch.cat(seen, 1), gate.first.weight, gate.first.bias).relu()
    weights = F.linear(hidden, gate.second.weight, gate.second.bias).softmax(1)
    w_mri, w_ecg = weights[:, :, None, None, None].unbind(1)
    mixed = features * w_mri + ecg_map * w_ecg
    return features + mixed * (1 + gamma[..., None, None]) + beta[..., None, None], weights


def gradients(outputs, leaves, seed=1):
    """Return the gradients of a random weighing of the outputs, as copies."""
    generator = torch.Generator().manual_seed(seed)
    total = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    return [grad.clone() for grad in torch.autograd.grad(total, leaves, materialize_grads=True)]


@pytest.mark.parametrize(("dim", "number"), [(128, 37_570), (256, 70_722), (512, 137_026)])
def test_parameters_are_the_published_number(dim, number):
    block = TemporalAwareFusion(dim)
    assert sum(parameter.numel() for parameter in block.parameters()) == number
    film = 2 * 64 + 65 * 2 * dim
    assert sum(parameter.numel() for parameter in TemporalAwareFusion(dim, time=False).parameters()) == number - film


@every_option
def test_result_weights_and_gradients_are_the_equations(options):
    block, (features, code, days) = random_block(**options), random_arguments()
    leaves = [features, code, *block.parameters()]
    outputs = [block(features, code, days), by_the_equations(block, features, code, days)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(gradients(both, leaves) for both in outputs))


@given(data=st.data())
def test_property_any_sizes_options_and_missing_ecgs(data):
    """Each sample for itself: with an ECG as the equations say, without one as it came."""
    batch, dim, ecg_dim, height, width = (data.draw(st.integers(1, most)) for most in (4, 5, 5, 6, 6))
    options = data.draw(st.sampled_from(OPTIONS))
    has_ecg = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    block = random_block(dim, ecg_dim, **options)
    features, code, days = random_arguments(batch, dim, ecg_dim, (height, width))
    fused, weights = block(features, code, days, has_ecg)
    assert torch.equal(fused[~has_ecg], features[~has_ecg])
    assert not weights[~has_ecg].any()
    if has_ecg.any():
        expected = by_the_equations(block, features[has_ecg], code[has_ecg], days[has_ecg])
        torch.testing.assert_close((fused[has_ecg], weights[has_ecg]), expected)
        torch.testing.assert_close(weights[has_ecg].sum(1), torch.ones(int(has_ecg.sum()), dtype=torch.float64))


def test_starts_from_equal_weights_and_no_modulation():
    block, (features, code, days) = TemporalAwareFusion(4, 6).double(), random_arguments()
    fused, weights = block(features, code, days)
    assert torch.equal(weights, torch.full((3, 2), 0.5, dtype=torch.float64))
    p = F.linear(code, block.projection.weight, block.projection.bias)
    torch.testing.assert_close(fused, 1.5 * features + 0.5 * p[:, :, None, None])


def test_time_changes_nothing_at_first():
    timed, timeless = TemporalAwareFusion(4, 6), TemporalAwareFusion(4, 6, time=False)
    timeless.load_state_dict({k: v for k, v in timed.state_dict().items() if not k.startswith("film.")}, strict=True)
    features, code, days = random_arguments(dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(timed(features, code, days), timeless(features, code), strict=True))


def test_zero_init_projection_leaves_the_ecg_out_at_first():
    block, (features, code, days) = TemporalAwareFusion(4, 6, zero_init_proj=True).double(), random_arguments()
    torch.testing.assert_close(block(features, code, days)[0], 1.5 * features)


def test_a_grid_of_one_is_the_even_spread():
    even, grid = random_block(), random_block(spatial_mlp=1)
    grid.load_state_dict(even.state_dict(), strict=True)
    arguments = random_arguments()
    torch.testing.assert_close(grid(*arguments), even(*arguments))


@every_option
def test_samples_in_another_order_come_out_in_that_order(options):
    block, arguments = random_block(**options), random_arguments(batch=4)
    has_ecg, order = torch.tensor([True, False, True, True]), torch.tensor([2, 0, 3, 1])
    there = [out[order] for out in block(*arguments, has_ecg)]
    back = block(*(value[order] for value in arguments), has_ecg[order])
    torch.testing.assert_close(there, list(back))


@every_option
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_b9_samples_without_an_ecg_come_out_as_they_are(dtype, name, options):
    block, (features, code, days) = random_block(dtype=torch.float32, **options), random_arguments(dtype=torch.float32)
    features, has_ecg = (8 * features).to(dtype), torch.tensor([True, False, True])
    with backend(name):
        fused, weights = block(features, code, days, has_ecg)
        alone, weights_alone = block(features[::2], code[::2], days[::2])
    assert fused.dtype == dtype
    assert torch.equal(fused[1], features[1])
    assert torch.equal(weights[1], torch.zeros(2))
    torch.testing.assert_close((fused[::2], weights[::2]), (alone, weights_alone))


@every_option
def test_b9_what_stands_where_there_is_no_ecg_changes_no_gradient(options):
    """NaN, infinity and garbage in code and interval: nothing of them is seen, nor multiplied by zero."""
    block, (features, code, days) = random_block(**options), random_arguments()
    has_ecg = torch.tensor([True, False, True])
    results = []
    for rubbish in (0.0, 1e300, float("inf"), NAN):
        filled = torch.where(has_ecg[:, None], code, rubbish).detach().requires_grad_()
        interval = torch.where(has_ecg, days, rubbish)
        outputs = block(features, filled, interval, has_ecg)
        results.append([*outputs, *gradients(outputs, [features, filled, *block.parameters()])])
        assert not results[-1][3][1].any()  # the gradient of the missing code
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_option
def test_b9_a_sample_without_an_ecg_trains_nothing(options):
    """Nor does a spoilt image of it spoil what the others train; its own gradient passes through unchanged."""
    block, (features, code, days) = random_block(**options), random_arguments()
    parameters = list(block.parameters())
    has_ecg = torch.tensor([True, False, True])
    kept = gradients([block(features, code, days, has_ecg)[0][::2]], parameters)
    alone = gradients([block(features[::2], code[::2], days[::2])[0]], parameters)
    torch.testing.assert_close(kept, alone)
    fused, _ = block(features, code, days, has_ecg)
    (passed,) = torch.autograd.grad(fused[1].sum(), features)
    assert torch.equal(passed, has_ecg.logical_not()[:, None, None, None].double().expand_as(features))
    spoilt = features.detach().clone()
    spoilt[1] = NAN
    assert all(
        torch.equal(a, b)
        for a, b in zip(kept, gradients([block(spoilt, code, days, has_ecg)[0][::2]], parameters), strict=True)
    )


@every_option
def test_b10_without_any_ecg_the_maps_come_out(options):
    block, (features, code, days) = random_block(**options), random_arguments()
    fused, weights = block(features, NAN * code, NAN * days, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(fused, features)
    assert not weights.any()
    assert all(not grad.any() for grad in gradients([fused, weights], list(block.parameters())))


@given(days=st.integers(-5, 200))
def test_b11_one_interval_in_every_form(days):
    block, (features, code, _) = random_block(gate_sees_time=True), random_arguments()
    expected = by_the_equations(block, features, code, torch.full((3,), days, dtype=torch.float64))
    whole = torch.full((3,), days)
    for form in (days, float(days), torch.tensor(days), whole, whole[:, None], whole.to(torch.float32)):
        torch.testing.assert_close(block(features, code, form), expected)


def test_b11_intervals_that_are_missing_or_do_not_count():
    features, code, days = random_arguments()
    with pytest.raises(ValueError, match="interval is None; expected the days between image and ECG"):
        random_block()(features, code)
    with pytest.raises(ShapeError, match=r"interval has shape \(2,\); expected \(3,\) or \(3, 1\)"):
        random_block()(features, code, days[:2])
    timeless = random_block(time=False)
    assert torch.equal(timeless(features, code, NAN * days)[0], timeless(features, code)[0])


@every_option
def test_networks_run_in_float32_whatever_runs_around_them(options):
    block, (features, code, days) = random_block(dtype=torch.float32, **options), random_arguments(dtype=torch.float32)
    expected = block(features, code, days)
    assert expected[1].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(block(features, code, days), expected, strict=True))
        low = block(features.bfloat16(), code.bfloat16(), days)
    assert (low[0].dtype, low[1].dtype) == (torch.bfloat16, torch.float32)
    exact = block(features.bfloat16().float(), code.bfloat16().float(), days)
    torch.testing.assert_close(low[1], exact[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(low[0], exact[0].bfloat16())


def test_weights_are_drawn_as_linear_layers_draw_them():
    blocks = [TemporalAwareFusion(64) for _ in range(2)]
    for block in blocks:
        block.reset_parameters(torch.Generator().manual_seed(5))
    first, second = (block.state_dict() for block in blocks)
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key, inputs in (("projection", 64), ("gate.first", 128), ("film.mlp.first", 1)):
        assert 0.9 < first[f"{key}.weight"].abs().max() * inputs**0.5 <= 1


@every_option
def test_b13_b14_copies_and_state(options):
    block, arguments = random_block(**options), random_arguments()
    expected = block(*arguments)[0]
    stream = io.BytesIO()
    torch.save(block.state_dict(), stream)
    stream.seek(0)
    loaded = TemporalAwareFusion(4, 6, **options).double()
    loaded.load_state_dict(torch.load(stream), strict=True)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert torch.equal(twin(*arguments)[0], expected)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": torch.zeros(3, 4, 5)}, ShapeError, r"features has shape \(3, 4, 5\); expected \(B, 4, H, W\)"),
        ({"features": torch.zeros(3, 5, 4, 4)}, ShapeError, r"features has shape \(3, 5, 4, 4\)"),
        ({"ecg_code": torch.zeros(3, 64)}, ShapeError, r"ecg_code has shape \(3, 64\); expected \(3, 6\)"),
        ({"ecg_code": torch.zeros(6)}, ShapeError, r"ecg_code has shape \(6,\)"),
        ({"has_ecg": torch.ones(3)}, TypeError, r"has_ecg is torch\.float32; expected torch\.bool"),
        ({"has_ecg": torch.ones(3, 1).bool()}, ShapeError, r"has_ecg has shape \(3, 1\); expected \(3,\)"),
    ],
)
def test_refuses_what_does_not_fit(changed, error, message):
    arguments = dict(zip(("features", "ecg_code", "interval"), random_arguments(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        TemporalAwareFusion(4, 6)(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"time": False, "gate_sees_time": True}, "needs time=True"), ({"spatial_mlp": 0}, "at least 1, or None, got 0")],
)
def test_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TemporalAwareFusion(4, **options)


@pytest.mark.parametrize(("spatial_mlp", "is_seen"), [(None, False), (2, True)])
def test_an_instance_norm_takes_away_what_is_the_same_at_every_position(spatial_mlp, is_seen):
    """Without padding, a convolution and its norm give the same for any code; not so for one spread unevenly."""
    torch.manual_seed(0)
    fusion = TemporalAwareFusion(6, ecg_dim=5, time=False, spatial_mlp=spatial_mlp).double()
    convolve = torch.nn.Conv2d(6, 4, 3).double()
    features, codes = torch.randn(1, 6, 12, 12, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    first, second = (
        torch.nn.functional.instance_norm(convolve(fusion(features, code[None])[0]), eps=1e-12) for code in codes
    )
    difference = (first - second).abs().max().item()
    assert (difference > 0.1) if is_seen else (difference < 1e-6)
