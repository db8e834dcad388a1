"""Batch norm with activation: values, every gradient, running statistics, every layout and size, on all backends."""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from unittest import mock

import pytest
import torch
from forms import asked_gradients, with_every_type
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from trifuse.kernels import ShapeError, backend, batch_norm_activation, batch_norm_activation_reference
from trifuse.kernels.testing import assert_op_matches, launches, poisoned_empty, tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu}
every_backend = pytest.mark.parametrize("name", BACKENDS)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
# Two values, odd and prime sizes, more channels than a tile, several tiles, one row, a single position
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 7), (1, 70, 4, 4), (2, 2, 33, 41), (3, 2, 1, 9), (4, 3, 1, 1)]
LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns of a wider map": lambda x: torch.cat([x, x], 3)[..., 1 : x.shape[3] + 1],
    "some channels of a map": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] + 1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one map for all samples": lambda x: x[:1].expand_as(x),
    "one column": lambda x: x[..., :1],
}


def random_arguments(shape, dtype=torch.float32, needed=(True, True, True), seed=0):
    """Maps, running statistics that are about theirs, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, mean = (torch.randn(size, generator=generator) for size in (shape, *[shape[1:2]] * 3))
    mean, variance = mean / 8, 0.5 + torch.rand(shape[1:2], generator=generator)
    x, weight, bias = (
        value.requires_grad_(need) for value, need in zip((x.to(dtype), weight, bias), needed, strict=True)
    )
    return x, mean, variance, weight, bias


def on_copies(form):
    """A form that leaves the running statistics that it is given as they are."""

    @wraps(form)
    def run(x, mean, variance, *affine, **options):
        return form(x, *(value if value is None else value.clone() for value in (mean, variance)), *affine, **options)

    return run


def check(name, x, *rest, **options):
    """Compare with the reference; gradients of weight and bias are sums over a batch, which float32 rounds.

    PyTorch adds up one after the other, and rounds to the type of the map what it activates, and its gradient.
    """
    elements, unit = max(4, x.numel()), torch.finfo(torch.float32).eps
    atol = 4 * torch.finfo(x.dtype).eps + 8 * unit * elements**0.5
    if name == "torch":
        atol += 4 * unit * elements + 2 * (x.dtype != torch.float32) * torch.finfo(x.dtype).eps * elements**0.5
    with backend(name), poisoned_empty():
        forms = on_copies(batch_norm_activation), on_copies(batch_norm_activation_reference)
        assert_op_matches(*forms, x, *rest, atol=atol, **options)


@pytest.fixture
def small_tiles(monkeypatch):
    """Maps of several tiles, whose sums are made in parts and by more than one program of each launch."""
    maps, forward, instances, backward = (
        import_module(f"trifuse.kernels.gpu.{name}")
        for name in ("maps", "batch_norm_activation", "instance_norm_leaky_relu", "instance_norm_leaky_relu_backward")
    )
    monkeypatch.setattr(maps, "TILE", 16)
    monkeypatch.setattr(maps, "TILES_PER_PART", 2)
    monkeypatch.setattr(forward, "MOST_TILES", 0)
    monkeypatch.setattr(forward, "PARTS_AT_ONCE", 2)
    monkeypatch.setattr(forward, "CHANNELS_AT_ONCE", 2)
    for module in (instances, backward):
        monkeypatch.setattr(module, "TILES_PER_PROGRAM", 2)
    monkeypatch.setattr(backward, "SAMPLES_AT_ONCE", 1)
    monkeypatch.setattr(backward, "CHANNELS_AT_ONCE", 2)
    return maps


@in_both_modes
@every_activation
def test_reference_matches_pytorch(activation, training):
    x, mean, variance, *affine = random_arguments((2, 3, 4, 5))
    running = mean.clone(), variance.clone()
    expected = ACTIVATIONS[activation](F.batch_norm(x, *running, *affine, training, 0.3, 1e-3))
    options = {"training": training, "momentum": 0.3, "eps": 1e-3, "activation": activation}
    torch.testing.assert_close(batch_norm_activation_reference(x, mean, variance, *affine, **options), expected)
    torch.testing.assert_close((mean, variance), running)


def test_reference_matches_definition():
    x, _, _, weight, bias = (value.detach().double() for value in random_arguments((2, 2, 2, 3)))
    for c in range(2):
        values = x[:, c]
        mean = values.sum() / 12
        z = (values - mean) / ((values - mean).square().sum() / 12 + 1e-5) ** 0.5 * weight[c] + bias[c]
        rectified = batch_norm_activation_reference(x, None, None, weight, bias)
        torch.testing.assert_close(rectified[:, c], torch.where(z > 0, z, 0.0))
        smooth = batch_norm_activation_reference(x, None, None, weight, bias, activation="gelu")
        torch.testing.assert_close(smooth[:, c], z * torch.distributions.Normal(0, 1).cdf(z))


@every_backend
@in_both_modes
@every_activation
@pytest.mark.parametrize(("shape", "dtype"), with_every_type([(shape,) for shape in SHAPES], DTYPES), ids=str)
def test_values_and_every_gradient(name, dtype, shape, activation, training):
    """K14: odd, prime and single sizes among them."""
    check(name, *random_arguments(shape, dtype), training=training, activation=activation)


@pytest.mark.parametrize(("name", "small"), [*((name, True) for name in ("triton", "torch")), ("triton", False)])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_are_those_of_the_module(name, small, momentum, kind, request):
    """And of every batch so far alike, where it has no momentum."""
    if torch.cuda.is_available() and name == "triton":
        pytest.skip("on a GPU machine test_on_gpu.py runs the kernels")
    if not small:
        request.getfixturevalue("small_tiles")
    norm = nn.BatchNorm2d(3, momentum=momentum)
    running = norm.running_mean.to(kind, copy=True), norm.running_var.to(kind, copy=True)
    for step in range(3):
        x = random_arguments((2, 3, 4, 5), seed=step)[0] * 3 + 1
        norm(x)
        share = 1 / (step + 1) if momentum is None else momentum
        with backend(name):
            batch_norm_activation(x, *running, training=True, momentum=share)
    expected = norm.running_mean.to(kind), norm.running_var.to(kind)
    tolerance = {"rtol": 0.02, "atol": 0.02} if kind == torch.bfloat16 else {}
    torch.testing.assert_close(running, expected, **tolerance)


@every_backend
def test_running_statistics_that_lie_apart_are_kept_up_to_date(name):
    x, mean, variance, *_ = random_arguments((2, 3, 4, 5))
    apart = [torch.stack([value, value], -1)[:, 0] for value in (mean, variance)]
    with backend(name):
        batch_norm_activation(x, *apart, training=True)
        batch_norm_activation(x, mean, variance, training=True)
    torch.testing.assert_close(tuple(apart), (mean, variance))


@interpreted
@in_both_modes
def test_what_the_running_statistics_were_is_missed_by_backward_in_evaluation_alone(training):
    """A gradient that needs what a later batch wrote over is refused, not computed from something else."""
    x, mean, variance, *affine = random_arguments((2, 3, 4, 5))
    with backend("triton"):
        out = batch_norm_activation(x, mean, variance, *affine, training=training).sum()
        batch_norm_activation(x, mean, variance, training=True)
        if training:
            out.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward()


@every_backend
def test_running_statistics_under_inference_mode(name):
    with torch.inference_mode(), backend(name):
        x, mean, variance, *affine = random_arguments((2, 3, 4, 5), needed=(False,) * 3)
        before = mean.clone()
        batch_norm_activation(x, mean, variance, *affine, training=True)
    assert not torch.equal(mean, before)


@every_backend
@in_both_modes
@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_weight_and_bias_may_be_absent(name, given, training):
    *maps, weight, bias = random_arguments((2, 3, 4, 5))
    check(name, *maps, weight if given == "weight" else None, bias if given == "bias" else None, training=training)


@every_backend
def test_without_running_statistics_those_of_the_batch_are_taken(name):
    x, _, _, *affine = random_arguments((2, 3, 4, 5))
    check(name, x, None, None, *affine, eps=0.5)
    with backend(name):
        both = [batch_norm_activation(x, None, None, *affine, training=training) for training in (True, False)]
    assert torch.equal(*both)


@every_backend
@in_both_modes
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_k12_zero_size(name, shape, training):
    x, mean, variance, weight, bias = random_arguments(shape)
    before = mean.clone()
    with backend(name):
        out = batch_norm_activation(x, mean, variance, weight, bias, training=training)
        out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))
    assert torch.equal(mean, before)


@every_backend
@in_both_modes
@pytest.mark.parametrize("needed", asked_gradients(3))
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=interpreted)])
def test_k22_only_the_gradients_asked_for(name, needed, training, large, request):
    if large:
        request.getfixturevalue("small_tiles")
    x, *running, weight, bias = random_arguments((2, 3, 4, 5), needed=needed)
    check(name, x, *running, weight, bias, training=training)
    if any(needed):
        with backend(name):
            batch_norm_activation(x, *running, weight, bias, training=training).sum().backward()
        assert tuple(value.grad is not None for value in (x, weight, bias)) == needed


@every_backend
@in_both_modes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_k8_k9_k10_strides_and_offsets(name, layout, training):
    x, *small = random_arguments((2, 3, 6, 5))
    x = LAYOUTS[layout](x.detach()).requires_grad_()
    check(name, x, *small, training=training)
    strided = [torch.stack([v, v], -1)[..., 1].detach().requires_grad_(v.requires_grad) for v in small]
    check(name, x, *strided, training=training)
    with backend(name):
        out = batch_norm_activation(x, *small, training=training)
    assert layout != "channels last" or out.is_contiguous(memory_format=torch.channels_last)


@interpreted
@in_both_modes
@every_activation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_k8_k9_maps_of_many_tiles(small_tiles, layout, activation, training):
    x, *small = random_arguments((2, 3, 7, 11))
    x = LAYOUTS[layout](x.detach())
    if layout != "one column":
        assert small_tiles.part_programs(x, *small_tiles.tile_of(x))[1] > 1
    check("triton", x.requires_grad_(), *small, training=training, activation=activation)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_k8_k9_k14_channels_that_are_moved_sixteen_bytes_at_once(dtype, large, request):
    maps = import_module("trifuse.kernels.gpu.maps")
    if large:
        request.getfixturevalue("small_tiles")
    x, *small = random_arguments((2, 24, 3, 5), dtype)
    wide = torch.cat([x, x], 1).detach().contiguous(memory_format=torch.channels_last)
    for part in (wide[:, :24].contiguous(memory_format=torch.channels_last), wide[:, 4:28]):
        assert maps.unit_of(part) == 16 // dtype.itemsize
        check("triton", part.requires_grad_(), *small, training=True)


@interpreted
@every_activation
@in_both_modes
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, True)])
def test_small_maps_of_several_tiles_and_samples(activation, training, needed, monkeypatch):
    """As many as one program takes."""
    maps = import_module("trifuse.kernels.gpu.maps")
    small_tile = import_module("trifuse.kernels.gpu.batch_norm_activation").small_tile
    monkeypatch.setattr(maps, "TILE", 32)
    x, *small = random_arguments((2, 3, 11, 10), needed=needed)
    assert small_tile(x) == (1, 32)
    assert small_tile(x[..., :9].new_empty(3, 3, 11, 9)) is None
    check("triton", x, *small, training=training, activation=activation)


@interpreted
@pytest.mark.parametrize("small", [True, False])
def test_launches(small, request):
    """Of small maps one each way. Of others the map is read twice each way in training, and in evaluation once forward,
    and once backward for its gradient alone."""
    forward = {"_statistics_kernel": 1, "_merge_batch_statistics_kernel": 1, "_normalise_kernel": 1}
    both = [
        (True, (True, True, True), forward | {"_gradient_kernel": 2, "_affine_gradients_kernel": 1}),
        (True, (False, True, True), forward | {"_gradient_kernel": 1, "_affine_gradients_kernel": 1}),
        (False, (True, False, False), {"_normalise_kernel": 1, "_gradient_kernel": 1}),
    ]
    if small:
        both = [
            (True, (True, True, True), {"_small_maps_fwd_kernel": 1, "_small_maps_bwd_kernel": 1}),
            (False, (True, True, True), {"_normalise_kernel": 1, "_small_maps_bwd_kernel": 1}),
        ]
    else:
        request.getfixturevalue("small_tiles")
    for training, needed, expected in both:
        with backend("triton"), launches() as counted:
            arguments = random_arguments((2, 3, 7, 11), needed=needed)
            batch_norm_activation(*arguments, training=training).sum().backward()
        assert counted.kernels == expected


@every_backend
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(name, data):
    """The bias keeps what is rectified away from zero, where a gradient jumps with the last bit of a mean."""
    shape = data.draw(st.tuples(*(st.integers(0, most) for most in (3, 5, 5, 6))), label="(B, C, H, W)")
    if shape[0] * shape[2] * shape[3] == 1:
        shape = (*shape[:3], 2)
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    x = data.draw(tensors(shape, dtypes=(dtype,), expanded=True), label="x")
    signs = data.draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=shape[1], max_size=shape[1]), label="bias")
    kind = data.draw(st.sampled_from([torch.float32, dtype]), label="type of weight and bias")
    weight = torch.full(shape[1:2], 0.125, dtype=kind).requires_grad_()
    bias = torch.tensor(signs, dtype=kind).requires_grad_()
    activation = data.draw(st.sampled_from(["relu", "gelu"]), label="activation")
    module = import_module("trifuse.kernels.gpu.batch_norm_activation")
    most = data.draw(st.sampled_from([0, module.MOST_TILES]), label="most tiles of small maps")
    with mock.patch.object(module, "MOST_TILES", most):
        check(name, x, None, None, weight, bias, eps=0.01, activation=activation)


@in_both_modes
@every_activation
def test_gradcheck_reference_and_cpu_path(activation, training):
    x, mean, variance, *affine = (value.detach().double() for value in random_arguments((2, 3, 2, 3)))
    arguments = [value.requires_grad_() for value in (x, *affine)]
    last = [LAYOUTS["channels last"](x.detach()).requires_grad_(), *affine]
    for form in (batch_norm_activation, batch_norm_activation_reference):

        def run(x, weight, bias, form=form):
            running = mean.clone(), variance.clone()
            return form(x, *running, weight, bias, training=training, activation=activation)

        assert gradcheck(run, arguments)
        assert gradcheck(run, last)


@every_backend
@pytest.mark.parametrize("layout", [lambda x: x, LAYOUTS["channels last"]], ids=["planes", "channels last"])
def test_a_large_mean_costs_no_digits_of_the_variance(name, layout):
    """The mean of squares less the squared mean would be zero, or less, in float32."""
    x = layout(1e4 + torch.randn((3, 8, 33, 41), generator=torch.Generator().manual_seed(0)))
    variance = torch.ones(8)
    expected = batch_norm_activation_reference(x.double()).float()
    with backend(name):
        torch.testing.assert_close(batch_norm_activation(x), expected, atol=2e-2, rtol=0)
        batch_norm_activation(x, torch.zeros(8), variance, training=True, momentum=1.0)
    torch.testing.assert_close(variance, x.double().var((0, 2, 3)).float(), rtol=1e-3, atol=0)


@interpreted
def test_samples_with_other_means_spread_further(small_tiles):
    x = torch.randn((3, 2, 33, 41), generator=torch.Generator().manual_seed(0)) + torch.arange(3)[:, None, None, None]
    with backend("triton"):
        torch.testing.assert_close(batch_norm_activation(x), batch_norm_activation_reference(x))


@every_backend
@every_activation
def test_results_repeat_bit_for_bit(name, activation):
    def run():
        x, *running, weight, bias = random_arguments((2, 5, 33, 41))
        with backend(name):
            out = batch_norm_activation(x, *running, weight, bias, training=True, activation=activation)
        return [out, *running, *torch.autograd.grad(out.square().sum(), (x, weight, bias))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_a_single_value_per_channel_is_refused_in_training_as_by_pytorch(name):
    x, *small = random_arguments((1, 3, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(x, *small, True)
    with backend(name):
        for running in (small[:2], (None, None)):
            with pytest.raises(ShapeError, match=r"more than one value per channel in training, got .*\(1, 3, 1, 1\)"):
                batch_norm_activation(x, *running, training=running[0] is not None)
        expected = F.batch_norm(x, *small).relu()
        torch.testing.assert_close(batch_norm_activation(x, *small), expected)
