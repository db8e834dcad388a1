"""Instance norm with leaky rectifier: values, every gradient, every layout and size of planes, on all backends."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from forms import asked_gradients, with_every_type
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from trifuse.kernels import backend, instance_norm_leaky_relu, instance_norm_leaky_relu_reference
from trifuse.kernels.testing import assert_op_matches, launches, poisoned_empty, tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_backend = pytest.mark.parametrize("name", BACKENDS)
# Two positions, odd and prime sizes, more channels than a tile, a large plane, one row
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 7), (1, 70, 4, 4), (2, 2, 33, 41), (3, 2, 1, 9)]
LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns of a wider map": lambda x: torch.cat([x, x], 3)[..., 1 : x.shape[3] + 1],
    "some channels of a map": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] + 1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one map for all samples": lambda x: x[:1].expand_as(x),
    "one column": lambda x: x[..., :1],
}


def random_arguments(shape, dtype=torch.float32, needed=(True, True, True), seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, shape[1:2], shape[1:2])
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    drawn[0] = drawn[0].to(dtype)
    return [value.requires_grad_(need) for value, need in zip(drawn, needed, strict=True)]


def check(name, x, *affine, **options):
    """Compare with the reference; gradients of weight and bias are sums over a map, which float32 rounds.

    PyTorch adds up one after the other, and rounds a gradient of lower precision behind the rectifier.
    """
    elements, unit = max(4, x.numel()), torch.finfo(torch.float32).eps
    atol = 4 * torch.finfo(x.dtype).eps + 8 * unit * elements**0.5
    if name == "torch":
        atol += 4 * unit * elements + (x.dtype != torch.float32) * torch.finfo(x.dtype).eps * elements**0.5
    with backend(name), poisoned_empty():
        reference = instance_norm_leaky_relu_reference
        assert_op_matches(instance_norm_leaky_relu, reference, x, *affine, atol=atol, **options)


@pytest.fixture
def small_tiles(monkeypatch):
    """Planes of several tiles, whose sums are made in parts and by more than one program of each launch."""
    maps = import_module("trifuse.kernels.gpu.maps")
    forward = import_module("trifuse.kernels.gpu.instance_norm_leaky_relu")
    backward = import_module("trifuse.kernels.gpu.instance_norm_leaky_relu_backward")
    monkeypatch.setattr(maps, "TILE", 16)
    monkeypatch.setattr(maps, "TILES_PER_PART", 2)
    monkeypatch.setattr(forward, "MOST_HELD", 16)
    monkeypatch.setattr(forward, "ROWS", 4)
    for module in (forward, backward):
        monkeypatch.setattr(module, "TILES_PER_PROGRAM", 2)
    monkeypatch.setattr(backward, "SAMPLES_AT_ONCE", 1)
    monkeypatch.setattr(backward, "CHANNELS_AT_ONCE", 2)
    return maps


def test_reference_matches_pytorch():
    x, weight, bias = random_arguments((2, 3, 4, 5))
    normalised = F.instance_norm(x, weight=weight, bias=bias, eps=1e-3)
    expected = F.leaky_relu(normalised, 0.2)
    found = instance_norm_leaky_relu_reference(x, weight, bias, eps=1e-3, negative_slope=0.2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(instance_norm_leaky_relu_reference(x), F.leaky_relu(F.instance_norm(x), 0.01))


def test_reference_matches_definition():
    x, weight, bias = (value.double() for value in random_arguments((2, 2, 2, 3)))
    for b, c in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        plane = x[b, c]
        deviation = ((plane - plane.sum() / 6).square().sum() / 6 + 1e-5) ** 0.5
        z = (plane - plane.sum() / 6) / deviation * weight[c] + bias[c]
        expected = torch.where(z > 0, z, 0.01 * z)
        torch.testing.assert_close(instance_norm_leaky_relu_reference(x, weight, bias)[b, c], expected)


@every_backend
@pytest.mark.parametrize(("shape", "dtype"), with_every_type([(shape,) for shape in SHAPES], DTYPES), ids=str)
def test_values_and_every_gradient(name, dtype, shape):
    """K14: odd, prime and single sizes among them."""
    check(name, *random_arguments(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", asked_gradients(3))
def test_channels_last_maps_are_normalised_sample_by_sample_on_a_cpu(dtype, needed, monkeypatch):
    monkeypatch.setattr(import_module("trifuse.kernels.cpu.instance_norm"), "FEWEST_ELEMENTS", 1)
    x, *affine = random_arguments((3, 16, 14, 13), dtype, needed)
    x = LAYOUTS["channels last"](x.detach()).requires_grad_(needed[0])
    check("torch", x, *affine)
    with backend("torch"):
        assert instance_norm_leaky_relu(x, *affine).is_contiguous(memory_format=torch.channels_last)


@every_backend
@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_weight_and_bias_may_be_absent(name, given):
    x, weight, bias = random_arguments((2, 3, 4, 5))
    check(name, x, weight if given == "weight" else None, bias if given == "bias" else None)


@every_backend
@pytest.mark.parametrize(("eps", "slope"), [(0.5, 0.01), (1e-5, 0.0), (1e-5, 1.0)])
def test_eps_and_slope(name, eps, slope):
    check(name, *random_arguments((2, 3, 4, 5)), eps=eps, negative_slope=slope)


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_k12_zero_size(name, shape):
    x, weight, bias = random_arguments(shape)
    with backend(name):
        out = instance_norm_leaky_relu(x, weight, bias)
        out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@every_backend
@pytest.mark.parametrize("needed", asked_gradients(3))
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=interpreted)])
def test_k22_only_the_gradients_asked_for(name, needed, large, request):
    if large:
        request.getfixturevalue("small_tiles")
    arguments = random_arguments((2, 3, 4, 5), needed=needed)
    check(name, *arguments)
    if any(needed):
        with backend(name):
            instance_norm_leaky_relu(*arguments).sum().backward()
        assert tuple(value.grad is not None for value in arguments) == needed


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_k8_k9_k10_strides_and_offsets(name, layout):
    x, *affine = random_arguments((2, 3, 6, 5))
    x = LAYOUTS[layout](x.detach()).requires_grad_()
    check(name, x, *affine)
    strided = [torch.stack([value, value], -1)[..., 1].detach().requires_grad_() for value in affine]
    check(name, x, *strided)
    with backend(name):
        out = instance_norm_leaky_relu(x, *affine)
    assert layout != "channels last" or out.is_contiguous(memory_format=torch.channels_last)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_k8_k9_planes_of_many_tiles(small_tiles, layout, dtype):
    x, *affine = random_arguments((2, 3, 7, 11), dtype)
    x = LAYOUTS[layout](x.detach())
    if layout != "one column":
        assert small_tiles.part_programs(x, *small_tiles.tile_of(x))[1] > 1
    check("triton", x.requires_grad_(), *affine)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_k8_k9_k14_channels_that_are_moved_sixteen_bytes_at_once(dtype, large, request):
    maps = import_module("trifuse.kernels.gpu.maps")
    if large:
        request.getfixturevalue("small_tiles")
    x, *affine = random_arguments((2, 24, 3, 5), dtype)
    wide = torch.cat([x, x], 1).detach().contiguous(memory_format=torch.channels_last)
    for part in (wide[:, :24].contiguous(memory_format=torch.channels_last), wide[:, 4:28]):
        assert maps.unit_of(part) == 16 // dtype.itemsize
        check("triton", part.requires_grad_(), *affine)


@interpreted
def test_launches_of_held_and_of_large_planes(monkeypatch):
    """Held planes take one launch each way, large ones two: a map is read once, or twice; then what samples share."""
    maps = import_module("trifuse.kernels.gpu.maps")
    forward = import_module("trifuse.kernels.gpu.instance_norm_leaky_relu")
    held = {"_held_fwd_kernel": 1, "_held_bwd_kernel": 1, "_affine_gradients_kernel": 1}
    walked = {"_statistics_kernel": 1, "_normalise_kernel": 1, "_gradient_kernel": 2, "_affine_gradients_kernel": 1}
    in_parts = {**walked, "_merge_statistics_kernel": 1, "_add_parts_kernel": 1}
    for expected in (held, walked, in_parts):
        with backend("triton"), launches() as counted:
            instance_norm_leaky_relu(*random_arguments((2, 3, 50, 50))).sum().backward()
        assert counted.kernels == expected
        if expected is held:
            monkeypatch.setattr(forward, "MOST_HELD", 1024)
        else:
            monkeypatch.setattr(maps, "TILES_PER_PART", 1)


@interpreted
def test_tiles_of_held_planes():
    """Few channels in planes, whole sectors of channels where these are innermost, and no tile of too large a plane."""
    held_tile = import_module("trifuse.kernels.gpu.instance_norm_leaky_relu").held_tile
    maps = [torch.empty(1, channels, side, side, device="meta") for channels, side in ((512, 8), (64, 128), (32, 129))]
    assert [held_tile(x) for x in maps] == [(16, 64), (1, 16384), None]
    last = [x.to(memory_format=torch.channels_last) for x in (*maps, torch.empty(1, 72, 32, 32, device="meta"))]
    assert [held_tile(x) for x in last] == [(64, 64), None, None, (16, 1024)]


@every_backend
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(name, data):
    """The bias keeps what is rectified away from zero, where a gradient jumps with the last bit of a mean."""
    shape = data.draw(st.tuples(*(st.integers(0, most) for most in (2, 5, 5, 6))), label="(B, C, H, W)")
    if shape[2] * shape[3] == 1:
        shape = (*shape[:3], 2)
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    x = data.draw(tensors(shape, dtypes=(dtype,), expanded=True), label="x")
    signs = data.draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=shape[1], max_size=shape[1]), label="bias")
    kind = data.draw(st.sampled_from([torch.float32, dtype]), label="type of weight and bias")
    weight = torch.full(shape[1:2], 0.125, dtype=kind).requires_grad_()
    check(name, x, weight, torch.tensor(signs, dtype=kind).requires_grad_(), eps=0.01)


def test_gradcheck_reference_and_cpu_path():
    arguments = [value.detach().double().requires_grad_() for value in random_arguments((2, 3, 2, 3))]
    last = [LAYOUTS["channels last"](arguments[0].detach()).requires_grad_(), *arguments[1:]]
    for form in (instance_norm_leaky_relu, instance_norm_leaky_relu_reference):
        assert gradcheck(form, arguments)
        assert gradcheck(form, last)


@every_backend
@pytest.mark.parametrize("layout", [lambda x: x, LAYOUTS["channels last"]], ids=["planes", "channels last"])
def test_a_large_mean_costs_no_digits_of_the_variance(name, layout):
    """The mean of squares less the squared mean would be zero, or less, in float32."""
    x = layout(1e4 + torch.randn((1, 8, 33, 41), generator=torch.Generator().manual_seed(0)))
    expected = instance_norm_leaky_relu_reference(x.double()).float()
    with backend(name):
        torch.testing.assert_close(instance_norm_leaky_relu(x), expected, atol=2e-2, rtol=0)


@interpreted
def test_a_large_mean_costs_no_digits_in_parts(small_tiles):
    x = 1e4 + torch.randn((1, 2, 33, 41), generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0] = 2e4  # what comes first says nothing about the rest
    expected = instance_norm_leaky_relu_reference(x.double()).float()
    with backend("triton"):
        torch.testing.assert_close(instance_norm_leaky_relu(x), expected, atol=5e-3, rtol=0)


@every_backend
def test_results_repeat_bit_for_bit(name):
    def run():
        arguments = random_arguments((2, 5, 33, 41))
        with backend(name):
            out = instance_norm_leaky_relu(*arguments)
        return [out, *torch.autograd.grad(out.square().sum(), arguments)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
