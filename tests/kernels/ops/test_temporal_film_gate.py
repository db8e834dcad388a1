"""The temporal FiLM gate: values, each gradient by name, every layout, and every refusal, on all backends."""

from __future__ import annotations

import itertools
from importlib import import_module

import pytest
import torch
from forms import with_every_type
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import BackendError, backend, temporal_film_gate, temporal_film_gate_reference
from trifuse.kernels.testing import assert_op_matches, poisoned_empty, tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("features", "ecg", "weights", "scale", "shift")
NOTHING = (False,) * 5
every_backend = pytest.mark.parametrize("name", BACKENDS)
# one of everything, odd and prime sizes, more channels than a tile, more pixels than a tile, one row
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 70, 4, 4), (2, 2, 33, 41), (3, 2, 1, 9)]


def shapes_of(batch, channels, height, width):
    """Return the shapes of the five arguments."""
    return (batch, channels, height, width), (batch, channels), (batch, 2), (batch, channels), (batch, channels)


def random_arguments(shape, dtype=torch.float32, needed=(True,) * 5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features, *small = (torch.randn(size, generator=generator) for size in shapes_of(*shape))
    arguments = (features.to(dtype), *small)
    return [value.requires_grad_(need) for value, need in zip(arguments, needed, strict=True)]


def check(name, arguments):
    """Compare with the reference; the small gradients are sums over a map, which float32 rounds."""
    features, terms = arguments[0], max(4, arguments[0].numel()) ** 0.5
    atol = 16 * torch.finfo(torch.float32).eps * terms + 4 * torch.finfo(features.dtype).eps
    if any(value.dtype != torch.float32 for value in arguments[1:]):
        # the interpreter cuts off what a GPU rounds when low precision is stored
        atol += max(torch.finfo(value.dtype).eps for value in arguments[1:]) * 4 * terms
    with backend(name), poisoned_empty():
        assert_op_matches(temporal_film_gate, temporal_film_gate_reference, *arguments, atol=atol)


def test_reference_matches_definition():
    features, ecg, weights, scale, shift = random_arguments((2, 3, 4, 5))
    out = torch.zeros(2, 3, 4, 5)
    for b, c, h, w in itertools.product(*map(range, out.shape)):
        mixed = features[b, c, h, w] * weights[b, 0] + ecg[b, c] * weights[b, 1]
        out[b, c, h, w] = features[b, c, h, w] + mixed * (1 + scale[b, c]) + shift[b, c]
    torch.testing.assert_close(temporal_film_gate_reference(features, ecg, weights, scale, shift), out)


@pytest.mark.parametrize("form", [temporal_film_gate, temporal_film_gate_reference], ids=lambda form: form.__name__)
def test_gradients_are_the_published_ones(form):
    """In float64, written out from the two sums over positions and the mixed map."""
    arguments = [value.detach().double().requires_grad_() for value in random_arguments((2, 3, 4, 5))]
    features, ecg, weights, scale, _ = (value.detach() for value in arguments)
    g = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = dict(zip(NAMES, torch.autograd.grad(form(*arguments), arguments, g), strict=True))
    w_mri, w_ecg, s = weights[:, :1], weights[:, 1:], 1 + scale
    mixed = features * w_mri[..., None, None] + (ecg * w_ecg)[..., None, None]
    expected = {
        "features": g * (1 + w_mri * s)[..., None, None],
        "ecg": w_ecg * s * g.sum((2, 3)),
        "weights": torch.stack([(s * (g * features).sum((2, 3))).sum(1), (s * ecg * g.sum((2, 3))).sum(1)], dim=1),
        "scale": (g * mixed).sum((2, 3)),
        "shift": g.sum((2, 3)),
    }
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


@every_backend
@pytest.mark.parametrize(("shape", "dtype"), with_every_type([(shape,) for shape in SHAPES], DTYPES), ids=str)
def test_values_and_each_gradient(name, dtype, shape):
    """K14: odd, prime and single sizes among them."""
    check(name, random_arguments(shape, dtype))


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_k12_zero_size(name, shape):
    arguments = random_arguments(shape)
    with backend(name):
        out = temporal_film_gate(*arguments)
        out.sum().backward()
    assert out.shape == arguments[0].grad.shape == shape
    for value in arguments[1:]:
        assert torch.equal(value.grad, torch.zeros_like(value))


LAYOUTS = {
    "planes": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns of a wider map": lambda x: torch.cat([x, x], 3)[..., 1 : x.shape[3] + 1],
    "some channels of a map": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] + 1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one map for all samples": lambda x: x[:1].expand_as(x),
    "one column": lambda x: x[..., :1],
}


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_k8_k9_k10_strides_and_offsets(name, layout):
    features = LAYOUTS[layout](random_arguments((2, 3, 6, 5))[0].detach()).requires_grad_()
    _, *small = random_arguments(tuple(features.shape))
    check(name, [features, *small])
    # as a network gives them: the halves of one output, and one vector for every sample
    scale, shift = torch.cat([small[2], small[3]], dim=1).detach().chunk(2, dim=1)
    strided = [small[0][:1].expand_as(small[0]), small[1].flip(1).t().contiguous().t(), scale, shift]
    check(name, [features, *(value.detach().requires_grad_() for value in strided)])
    with backend(name):
        assert temporal_film_gate(features, *small).stride() == torch.empty_like(features).stride()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k8_k9_k14_channels_that_are_moved_sixteen_bytes_at_once(dtype):
    features, *small = random_arguments((2, 24, 3, 5))
    scale, shift = torch.cat([small[2], small[3]], dim=1).detach().chunk(2, dim=1)
    odd = torch.cat([small[2], small[3][:, :1]], dim=1).detach()[:, :24]
    wide = torch.cat([features, features], 1).detach().to(dtype).contiguous(memory_format=torch.channels_last)
    for maps, rows in ((wide[:, :24], (scale, shift)), (wide[:, 4:28], (scale, shift)), (wide[:, :24], (odd, shift))):
        arguments = [maps, *small[:2], *rows]
        check("triton", [value.detach().requires_grad_() for value in arguments])


@every_backend
@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_k9_incoming_gradients_of_any_layout(name, layout):
    arguments = random_arguments((2, 3, 4, 5))
    arguments[0] = LAYOUTS[layout](arguments[0].detach()).requires_grad_()
    expected = temporal_film_gate_reference(*arguments)
    for kind in LAYOUTS.values():
        grad = kind(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2)))
        if grad.shape == expected.shape:
            with backend(name):
                got = torch.autograd.grad(temporal_film_gate(*arguments), arguments, grad)
            torch.testing.assert_close(got, torch.autograd.grad(expected, arguments, grad, retain_graph=True))


@every_backend
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(name, data):
    shape = data.draw(st.tuples(*(st.integers(0, most) for most in (2, 5, 5, 6))), label="(B, C, H, W)")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    features, *small = shapes_of(*shape)
    arguments = [data.draw(tensors(features, dtypes=(dtype,), expanded=True), label="features")]
    for argument, size in zip(NAMES[1:], small, strict=True):
        arguments.append(data.draw(tensors(size, dtypes=(torch.float32, dtype), expanded=True), label=argument))
    check(name, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_b9_nothing_mixed_in_leaves_the_map_as_it_is(name, dtype, layout):
    """Weights, scale and shift of zero: every value of the map comes out, to the last bit."""
    features, ecg, *_ = random_arguments((2, 3, 6, 5), dtype, needed=NOTHING)
    features = LAYOUTS[layout](features * torch.logspace(-4, 4, 5)).to(dtype)
    with backend(name):
        out = temporal_film_gate(features, 1e30 * ecg, torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 3))
    assert torch.equal(out, features)


@every_backend
def test_k19_nan_and_infinity_stay_where_they_are(name):
    features, ecg, weights, scale, shift = random_arguments((2, 3, 4, 5), needed=NOTHING)
    features[1, 2, 3, 4], features[0, 0, 0, 0] = float("nan"), float("inf")
    ecg[0, 1] = float("nan")
    with backend(name):
        out = temporal_film_gate(features, ecg, weights, scale, shift)
    reference = temporal_film_gate_reference(features, ecg, weights, scale, shift)
    assert out.isnan().sum() == 1 + 4 * 5
    assert torch.equal(out.isnan(), reference.isnan())
    assert torch.equal(out.isinf(), features.isinf())


@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_gradcheck_reference_and_cpu_path(layout):
    features, *small = (value.detach().double() for value in random_arguments((2, 3, 2, 2)))
    arguments = [value.requires_grad_() for value in (LAYOUTS[layout](features), *small)]
    for form in (temporal_film_gate, temporal_film_gate_reference):
        assert gradcheck(form, arguments)


def test_k3_float64_is_computed_in_float64():
    arguments = [value.detach().double() for value in random_arguments((2, 3, 2, 2))]
    truth = temporal_film_gate_reference(*arguments)
    torch.testing.assert_close(temporal_film_gate(*arguments), truth, rtol=1e-15, atol=1e-15)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        temporal_film_gate(*arguments)


@pytest.mark.slow  # one form of each operator: test_registered_operators.py
@interpreted
def test_opcheck():
    torch.library.opcheck(torch.ops.trifuse.temporal_film_gate.default, random_arguments((2, 3, 4, 5)))
    features, *small = random_arguments((2, 3, 4, 5), needed=NOTHING)
    grad, backward = torch.randn(2, 3, 4, 5), torch.ops.trifuse.temporal_film_gate_backward.default
    for map_ in (features, LAYOUTS["channels last"](features)):
        torch.library.opcheck(backward, (grad, map_, *small, True))
    torch.library.opcheck(backward, (grad, features, *small, False))
    torch.library.opcheck(backward, (grad, None, *small, True))


@every_backend
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name):
    torch._dynamo.reset()
    compiled = torch.compile(temporal_film_gate, fullgraph=True, backend="aot_eager", dynamic=True)
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for width in (5, 6, 9):
            arguments = random_arguments((2, 3, 4, width))
            got = torch.autograd.grad(compiled(*arguments).square().sum(), arguments)
            expected = torch.autograd.grad(temporal_film_gate_reference(*arguments).square().sum(), arguments)
            torch.testing.assert_close(got, expected)


def test_k7_fake_and_meta_tensors_give_shapes_without_data():
    shape = (2**8, 2**8, 2**8, 2**8)
    features, *small = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in shapes_of(*shape))
    out = temporal_film_gate(features, *small)
    assert (out.shape, out.dtype, out.device.type) == (shape, torch.bfloat16, "meta")
    with FakeTensorMode():
        arguments = random_arguments((2, 3, 4, 5))
        temporal_film_gate(*arguments).sum().backward()
        assert [value.grad.shape for value in arguments] == [value.shape for value in arguments]


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(mode):
    first, second = (random_arguments((2, 3, 4, 5), needed=NOTHING, seed=seed) for seed in (0, 1))
    graph = make_fx(temporal_film_gate, tracing_mode=mode)(*first)
    torch.testing.assert_close(graph(*second), temporal_film_gate_reference(*second))


@every_backend
def test_k26_vmap_functional_and_forward_mode_differentiation(name):
    features, *small = random_arguments((2, 3, 4, 5), needed=NOTHING)
    reference, scales = temporal_film_gate_reference, torch.stack([small[2], -small[2]])

    def of_scale(scale):
        return temporal_film_gate(features, *small[:2], scale, small[3])

    with backend(name):
        mapped = torch.vmap(of_scale)(scales)
        _, pushed = torch.func.jvp(of_scale, (small[2],), (torch.ones_like(small[2]),))
        pulled = torch.func.grad(lambda scale: of_scale(scale).square().sum())(small[2])
    torch.testing.assert_close(mapped, torch.stack([reference(features, *small[:2], s, small[3]) for s in scales]))
    w_mri, w_ecg = small[1][:, :, None, None, None].unbind(1)
    torch.testing.assert_close(pushed, features * w_mri + small[0][:, :, None, None] * w_ecg)
    scale = small[2].requires_grad_()
    (expected,) = torch.autograd.grad(reference(features, *small[:2], scale, small[3]).square().sum(), scale)
    torch.testing.assert_close(pulled, expected)


@interpreted
@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_channels_of_many_pixels_are_summed_in_parts(monkeypatch, layout):
    """More channels than the second launch takes at once, too."""
    maps, film = (import_module(f"trifuse.kernels.gpu.{name}") for name in ("maps", "temporal_film_gate"))
    monkeypatch.setattr(maps, "TILE", 16)
    monkeypatch.setattr(maps, "TILES_PER_PART", 2)
    monkeypatch.setattr(film, "CHANNELS_AT_ONCE", 2)
    features, *small = random_arguments((2, 3, 7, 11), torch.bfloat16)
    features = LAYOUTS[layout](features.detach()).requires_grad_()
    assert maps.part_programs(features, *maps.tile_of(features))[1] > 1
    check("triton", [features, *small])
