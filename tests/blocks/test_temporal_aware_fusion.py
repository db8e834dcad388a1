"""Temporal-aware fusion: the equations, every gradient, samples without an ECG, intervals, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from fusion_equations import (
    FIRST_FORM,
    OPTIONS,
    SEGMENTS,
    by_the_equations,
    ecg_map_by_the_equations,
    gradients,
    labels_of,
    random_arguments,
    random_block,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from trifuse.blocks import TemporalAwareFusion
from trifuse.kernels import DataError, ShapeError, backend

NAN = float("nan")
LABELS = torch.zeros(3, 5, 3, dtype=torch.uint8)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch", "reference")


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("dim", "number"), [(128, 37_570), (256, 70_722), (512, 137_026)])
def test_parameters_are_the_published_number(dim, number):
    assert parameters(TemporalAwareFusion(dim, projection="broadcast", gate_time="unseen")) == number
    assert parameters(TemporalAwareFusion(dim, projection="broadcast", gate_time="joined")) == number + 64
    assert parameters(TemporalAwareFusion(dim, projection="broadcast")) == number + 2 * 64 + 65 * 2
    film = 2 * 64 + 65 * 2 * dim
    assert parameters(TemporalAwareFusion(dim, time=False, projection="broadcast")) == number - film


def test_the_widths_of_gate_and_film_are_their_hidden_units():
    """One unit more of the gate: a row of its first layer with a bias, two weights of its second; likewise the film.

    What the gate has for the days is as wide as the rest of it.
    """
    number = parameters(TemporalAwareFusion(8, 6))
    assert parameters(TemporalAwareFusion(8, 6, gate_width=65)) == number + (8 + 6 + 1) + 2 + (1 + 1) + 2
    assert parameters(TemporalAwareFusion(8, 6, film_width=63)) == number - (1 + 1) - 2 * 8


@every_option
def test_result_weights_and_gradients_are_the_equations(options):
    block, (features, code, days) = random_block(**options), random_arguments()
    leaves = [features, code, *block.parameters()]
    outputs = [run(block, features, code, days), by_the_equations(block, features, code, days)]
    torch.testing.assert_close(*outputs)
    both = [gradients(each, leaves) for each in outputs]
    torch.testing.assert_close(*both)
    assert all(grad.any() for grad in both[0])


def test_the_gate_sees_the_means_that_it_is_given():
    block, (features, code, days) = random_block(), random_arguments()
    means = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    outputs = [
        run(block, features, code, days, image_means=means),
        by_the_equations(block, features, code, days, image_means=means),
    ]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(gradients(each, [means, features]) for each in outputs))


@given(data=st.data())
def test_property_any_sizes_options_and_missing_ecgs(data):
    """Each sample for itself: with an ECG as the equations say, without one as it came."""
    batch, dim, ecg_dim, height, width = (data.draw(st.integers(1, most)) for most in (4, 5, 5, 6, 6))
    options = data.draw(st.sampled_from(OPTIONS))
    has_ecg = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    block = random_block(dim, ecg_dim, **options)
    features, code, days = random_arguments(batch, dim, ecg_dim, (height, width))
    fused, weights = run(block, features, code, days, has_ecg)
    assert torch.equal(fused[~has_ecg], features[~has_ecg])
    assert not weights[~has_ecg].any()
    if has_ecg.any():
        there = (features[has_ecg], code[has_ecg], days[has_ecg], labels_of(features)[has_ecg])
        expected = by_the_equations(block, *there)
        torch.testing.assert_close((fused[has_ecg], weights[has_ecg]), expected)
        torch.testing.assert_close(weights[has_ecg].sum(1), torch.ones(int(has_ecg.sum()), dtype=torch.float64))


def test_starts_from_equal_weights_and_no_modulation():
    block, (features, code, days) = TemporalAwareFusion(4, 6, num_segments=SEGMENTS).double(), random_arguments()
    fused, weights = run(block, features, code, days)
    assert torch.equal(weights, torch.full((3, 2), 0.5, dtype=torch.float64))
    z = F.layer_norm(code, (6,))
    ecg_map = ecg_map_by_the_equations(block, z, features, labels_of(features))
    torch.testing.assert_close(fused, 1.5 * features + 0.5 * ecg_map)
    assert block.direction.abs().min() > 0  # or no score would be heard, and none would learn


@pytest.mark.parametrize("seed", range(3))
def test_the_weights_differ_between_cases_as_soon_as_the_gate_has_learnt_anything(seed):
    """With a last layer that is not zero; none of the hidden units is the same for every case."""
    block, generator = TemporalAwareFusion(32, gate_time="unseen"), torch.Generator().manual_seed(seed)
    block.reset_parameters(generator)
    torch.nn.init.normal_(block.gate.second.weight, std=0.3, generator=generator)
    maps, codes = (torch.randn(24, *shape, generator=generator) for shape in ((32, 4, 4), (64,)))
    hidden = []
    block.gate.second.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    _, weights = block(maps, 0.01 * codes, 3.0, segments=torch.zeros(24, 4, 4, dtype=torch.uint8))
    assert weights[:, 1].std() > 0.05  # codes of any size are seen
    assert (hidden[0].std(0) > 0).all()
    old = TemporalAwareFusion(32, **FIRST_FORM)
    old.load_state_dict({name: x for name, x in block.state_dict().items() if name in old.state_dict()})
    assert old(F.instance_norm(maps), 0.01 * codes, 3.0)[1][:, 1].std() < 0.01


def test_time_changes_nothing_at_first():
    timed, timeless = (
        TemporalAwareFusion(4, 6, num_segments=SEGMENTS),
        TemporalAwareFusion(4, 6, time=False, num_segments=SEGMENTS),
    )
    state = {key.replace("gate.others.", "gate."): value for key, value in timed.state_dict().items()}
    own = ("film.", "gate.time.")
    timeless.load_state_dict({key: value for key, value in state.items() if not key.startswith(own)}, strict=True)
    features, code, days = random_arguments(dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(run(timed, features, code, days), run(timeless, features, code), strict=True)
    )


@every_option
def test_samples_in_another_order_come_out_in_that_order(options):
    block, arguments = random_block(**options), random_arguments(batch=4)
    has_ecg, order = torch.tensor([True, False, True, True]), torch.tensor([2, 0, 3, 1])
    labels = labels_of(arguments[0])
    there = [out[order] for out in block(*arguments, has_ecg, labels)]
    back = block(*(value[order] for value in arguments), has_ecg[order], labels[order])
    torch.testing.assert_close(there, list(back))


@every_option
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_b9_samples_without_an_ecg_come_out_as_they_are(dtype, name, options):
    block, (features, code, days) = random_block(dtype=torch.float32, **options), random_arguments(dtype=torch.float32)
    features, has_ecg = (8 * features).to(dtype), torch.tensor([True, False, True])
    with backend(name):
        labels = labels_of(features)
        fused, weights = block(features, code, days, has_ecg, labels)
        alone, weights_alone = block(features[::2], code[::2], days[::2], None, labels[::2])
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
        outputs = run(block, features, filled, interval, has_ecg)
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
    labels = labels_of(features)
    kept = gradients([block(features, code, days, has_ecg, labels)[0][::2]], parameters)
    alone = gradients([block(features[::2], code[::2], days[::2], None, labels[::2])[0]], parameters)
    torch.testing.assert_close(kept, alone)
    fused, _ = block(features, code, days, has_ecg, labels)
    (passed,) = torch.autograd.grad(fused[1].sum(), features)
    assert torch.equal(passed, has_ecg.logical_not()[:, None, None, None].double().expand_as(features))
    spoilt = features.detach().clone()
    spoilt[1] = NAN
    assert all(
        torch.equal(a, b)
        for a, b in zip(kept, gradients([block(spoilt, code, days, has_ecg, labels)[0][::2]], parameters), strict=True)
    )


@every_option
def test_b10_without_any_ecg_the_maps_come_out(options):
    block, (features, code, days) = random_block(**options), random_arguments()
    fused, weights = run(block, features, NAN * code, NAN * days, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(fused, features)
    assert not weights.any()
    assert all(not grad.any() for grad in gradients([fused, weights], list(block.parameters())))


@given(days=st.integers(-5, 200))
def test_b11_one_interval_in_every_form(days):
    block, (features, code, _) = random_block(gate_time="joined"), random_arguments()
    expected = by_the_equations(block, features, code, torch.full((3,), days, dtype=torch.float64))
    whole = torch.full((3,), days)
    for form in (days, float(days), torch.tensor(days), whole, whole[:, None], whole.to(torch.float32)):
        torch.testing.assert_close(run(block, features, code, form), expected)


def test_b11_intervals_that_are_missing_or_do_not_count():
    features, code, days = random_arguments()
    with pytest.raises(ValueError, match="interval is None; expected the days between image and ECG"):
        run(random_block(), features, code)
    with pytest.raises(ShapeError, match=r"interval has shape \(2,\); expected \(3,\) or \(3, 1\)"):
        run(random_block(), features, code, days[:2])
    timeless = random_block(time=False)
    assert torch.equal(run(timeless, features, code, NAN * days)[0], run(timeless, features, code)[0])


@every_option
def test_networks_run_in_float32_whatever_runs_around_them(options):
    block, (features, code, days) = random_block(dtype=torch.float32, **options), random_arguments(dtype=torch.float32)
    expected = run(block, features, code, days)
    assert expected[1].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(block, features, code, days), expected, strict=True))
        low = run(block, features.bfloat16(), code.bfloat16(), days)
    assert (low[0].dtype, low[1].dtype) == (torch.bfloat16, torch.float32)
    block.rectify, rectified = False, block.rectify  # what is applied to a map is rounded as the map is
    exact = run(block, features.bfloat16().float(), code.bfloat16().float(), days)
    torch.testing.assert_close(low[1], exact[1], rtol=1e-6, atol=1e-6)
    rounded = exact[0].bfloat16()
    assert torch.equal(low[0], F.leaky_relu(rounded, 0.01) if rectified else rounded)


def test_weights_are_drawn_as_linear_layers_draw_them():
    blocks = [TemporalAwareFusion(64) for _ in range(2)]
    for block in blocks:
        block.reset_parameters(torch.Generator().manual_seed(5))
    first, second = (block.state_dict() for block in blocks)
    assert all(torch.equal(first[key], second[key]) for key in first)
    gate = {"gate.others.first": 128, "gate.time.first": 1}
    for key, inputs in {"projection": 64, **gate, "film.mlp.first": 1, "scores": 64}.items():
        assert 0.9 < first[f"{key}.weight"].abs().max() * inputs**0.5 <= 1
    assert 0.7 < first["direction"].std() < 1.3


@every_option
def test_b13_b14_copies_and_state(options):
    block, arguments = random_block(**options), random_arguments()
    expected = run(block, *arguments)[0]
    stream = io.BytesIO()
    torch.save(block.state_dict(), stream)
    stream.seek(0)
    loaded = TemporalAwareFusion(4, 6, num_segments=SEGMENTS, **options).double()
    loaded.load_state_dict(torch.load(stream), strict=True)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert torch.equal(run(twin, *arguments)[0], expected)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": torch.zeros(3, 4, 5)}, ShapeError, r"features has shape \(3, 4, 5\); expected \(B, 4, H, W\)"),
        ({"features": torch.zeros(3, 5, 4, 4)}, ShapeError, r"features has shape \(3, 5, 4, 4\)"),
        ({"ecg_code": torch.zeros(3, 64)}, ShapeError, r"ecg_code has shape \(3, 64\); expected \(3, 6\)"),
        ({"ecg_code": torch.zeros(6)}, ShapeError, r"ecg_code has shape \(6,\)"),
        ({"has_ecg": torch.ones(3)}, TypeError, r"has_ecg is torch\.float32; expected torch\.bool"),
        ({"has_ecg": torch.ones(3, 1).bool()}, ShapeError, r"has_ecg has shape \(3, 1\); expected \(3,\)"),
        ({"image_means": torch.zeros(3, 5)}, ShapeError, r"image_means has shape \(3, 5\); expected \(3, 4\)"),
        ({"transform": torch.zeros(3, 2, 2)}, ShapeError, r"transform has shape \(3, 2, 2\); expected \(3, 2, 3\)"),
        ({"segments": None}, ValueError, r"segments is None; projection='segments' needs labels \(B, H, W\) uint8"),
        (
            {"segments": LABELS[:, :4]},
            ShapeError,
            r"segments has shape \(3, 4, 3\); expected labels \(3, 5, 3\) or masks",
        ),
        ({"segments": torch.zeros(3, 16, 5, 3)}, ShapeError, r"or masks \(3, 17, 5, 3\), of the size of features"),
        ({"segments": LABELS.long()}, TypeError, r"labels in segments are torch\.int64; expected torch\.uint8"),
        (
            {"segments": LABELS + 18},
            DataError,
            "expected 0, outside of all segments, to 17, got the label 18; set what",
        ),
    ],
)
def test_refuses_what_does_not_fit(changed, error, message):
    arguments = dict(zip(("features", "ecg_code", "interval"), random_arguments(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        TemporalAwareFusion(4, 6)(**{**arguments, "segments": LABELS, **changed})
    if "segments" in changed and changed["segments"] is not None:
        with pytest.raises(error, match=message):
            TemporalAwareFusion(4, 6, projection="segments_full")(**{**arguments, **changed})


@every_option
def test_refuses_maps_of_whole_numbers(options):
    block, (_, code, days) = random_block(dtype=torch.float32, **options), random_arguments(dtype=torch.float32)
    features = torch.ones(3, 4, 5, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"features is torch\.int32; expected one of float32"):
        run(block, features, code, days)


def test_the_direction_starts_as_zero_where_the_projection_does():
    assert not TemporalAwareFusion(4, 6, zero_init_proj=True).direction.any()
    assert TemporalAwareFusion(4, 6).direction.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": False, "gate_time": "apart"}, "gate_time='apart' needs time=True"),
        ({"gate_time": "beside"}, "gate_time: expected one of 'apart', 'joined', 'unseen'"),
        ({"projection": "grid", "grid_side": 0}, "grid_side must be at least 1, got 0"),
        ({"ecg_dim": 0}, "ecg_dim must be at least 1, got 0"),
        ({"num_segments": 0}, "num_segments must be at least 1, got 0"),
        ({"projection": "segments_full", "num_segments": 256}, "num_segments must be at most 255.*got 256"),
        ({"max_days": 0}, "max_days must be positive and finite, got 0"),
        ({"max_days": float("inf")}, "max_days must be positive and finite, got inf"),
        ({"max_days": NAN}, "max_days must be positive and finite, got nan"),
        ({"gate_width": 0}, "gate_width must be at least 1, got 0"),
        ({"film_width": 0}, "film_width must be at least 1, got 0"),
        ({"projection": "spread"}, "projection: expected one of 'segments', 'segments_full', 'grid', 'broadcast'"),
    ],
)
def test_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TemporalAwareFusion(4, **options)
