"""The segment FiLM gate: values, each gradient by name, every layout, labels, and every way to call it."""

from __future__ import annotations

import itertools
from importlib import import_module

import pytest
import torch
from forms import with_every_type
from hypothesis import given
from hypothesis import strategies as st
from segment_film_calls import (
    BACKENDS,
    LAYOUTS,
    NAMES,
    NOTHING,
    every_backend,
    interpreted,
    leaves_of,
    random_arguments,
    shapes_of,
)
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import BackendError, backend, segment_film_gate, segment_film_gate_reference
from trifuse.kernels.testing import assert_op_matches, poisoned_empty, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# one of everything, odd and prime sizes, more channels than a tile, more pixels than a tile, one row
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 70, 4, 4), (2, 2, 33, 41), (3, 2, 1, 9)]


def check(name, arguments):
    """Compare with the reference; the small gradients are sums over a map, which float32 rounds."""
    features, terms = arguments[0], max(4, arguments[0].numel()) ** 0.5
    atol = 16 * torch.finfo(torch.float32).eps * terms + 4 * torch.finfo(features.dtype).eps
    if any(value.dtype != torch.float32 for value in arguments[2:]):
        # the interpreter cuts off what a GPU rounds when low precision is stored
        atol += max(torch.finfo(value.dtype).eps for value in arguments[2:]) * 4 * terms
    with backend(name), poisoned_empty():
        assert_op_matches(segment_film_gate, segment_film_gate_reference, *arguments, atol=atol)


def test_reference_matches_definition():
    features, segments, shared, scores, direction, weights, scale, shift = random_arguments((2, 3, 4, 5))
    out = torch.zeros(2, 3, 4, 5)
    for b, c, h, w in itertools.product(*map(range, out.shape)):
        label = int(segments[b, h, w])
        ecg = shared[b, c] + (scores[b, label - 1] * direction[c] if label else 0)
        mixed = features[b, c, h, w] * weights[b, 0] + ecg * weights[b, 1]
        out[b, c, h, w] = features[b, c, h, w] + mixed * (1 + scale[b, c]) + shift[b, c]
    got = segment_film_gate_reference(features, segments, shared, scores, direction, weights, scale, shift)
    torch.testing.assert_close(got, out)


@pytest.mark.parametrize("form", [segment_film_gate, segment_film_gate_reference], ids=lambda form: form.__name__)
def test_gradients_are_the_published_ones(form):
    """In float64, written out with one mask per segment."""
    arguments = [value.detach().double() if value.is_floating_point() else value for value in random_arguments()]
    features, segments, shared, scores, direction, weights, scale, _ = arguments
    g = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [value.requires_grad_() for value in leaves_of(arguments)]
    got = dict(zip(NAMES, torch.autograd.grad(form(*arguments), leaves, g), strict=True))
    masks = torch.stack([segments == s + 1 for s in range(scores.shape[1])], dim=1).double()
    with torch.no_grad():
        w_mri, w_ecg, s = weights[:, :1], weights[:, 1:], 1 + scale
        score = (masks * scores[:, :, None, None]).sum(1)
        ecg = shared[:, :, None, None] + score[:, None] * direction[:, None, None]
        mixed = features * w_mri[..., None, None] + ecg * w_ecg[..., None, None]
        of_ecg = g * (w_ecg * s)[..., None, None]
        expected = {
            "features": g * (1 + w_mri * s)[..., None, None],
            "shared": of_ecg.sum((2, 3)),
            "segment_scores": torch.einsum("bchw,bshw,c->bs", of_ecg, masks, direction),
            "direction": torch.einsum("bchw,bhw->c", of_ecg, score),
            "weights": torch.stack([(s * (g * m).sum((2, 3))).sum(1) for m in (features, ecg)], dim=1),
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
@pytest.mark.parametrize("layout", ["planes", "channels last"])
@pytest.mark.parametrize("count", [0, 1, 8, 255])
def test_any_number_of_segments(name, count, layout):
    """One, a whole block of those that the kernels sort at once, as many as a byte names, and none."""
    features, *others = random_arguments((2, 5, 4, 9), count=count)
    check(name, [LAYOUTS[layout](features.detach()).requires_grad_(), *others])


@every_backend
@pytest.mark.parametrize("label", [0, 17])
def test_one_label_everywhere(name, label):
    """Outside the wall the scores and the direction play no part, and get no gradient."""
    features, segments, *small = random_arguments()
    arguments = [features, torch.full_like(segments, label), *small]
    check(name, arguments)
    with backend(name):
        out = segment_film_gate(*arguments)
        of_scores, of_direction = torch.autograd.grad(out.square().sum(), small[1:3])
    assert (of_scores[:, :16] == 0).all()
    assert bool(of_scores[:, 16].any()) == bool(of_direction.any()) == (label == 17)


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_k12_zero_size(name, shape):
    arguments = random_arguments(shape)
    with backend(name):
        out = segment_film_gate(*arguments)
        out.sum().backward()
    assert out.shape == arguments[0].grad.shape == shape
    for value in arguments[2:]:
        assert torch.equal(value.grad, torch.zeros_like(value))


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_k8_k9_k10_strides_and_offsets(name, layout):
    features = LAYOUTS[layout](random_arguments((2, 3, 6, 5))[0].detach()).requires_grad_()
    _, segments, *small = random_arguments(tuple(features.shape))
    check(name, [features, segments, *small])
    # as a network gives them: the halves of one output, one vector for every sample, and labels of a wider map
    shared, scores, direction, weights, scale, shift = (value.detach() for value in small)
    scale, shift = torch.cat([scale, shift], dim=1).chunk(2, dim=1)
    strided = [shared[:1].expand_as(shared), scores.t().contiguous().t(), direction.repeat_interleave(2)[::2]]
    strided += [weights.flip(1).t().contiguous().t(), scale, shift]
    width = segments.shape[2]
    for labels in (
        torch.cat([segments, segments], dim=2)[:, :, 1 : width + 1],
        segments.transpose(1, 2).contiguous().transpose(1, 2),
        segments[:1].expand_as(segments),
    ):
        check(name, [features, labels, *(value.detach().requires_grad_() for value in strided)])
    with backend(name):
        assert segment_film_gate(features, segments, *small).stride() == torch.empty_like(features).stride()


@every_backend
@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_k9_incoming_gradients_of_any_layout(name, layout):
    arguments = random_arguments()
    arguments[0] = LAYOUTS[layout](arguments[0].detach()).requires_grad_()
    leaves = leaves_of(arguments)
    expected = segment_film_gate_reference(*arguments)
    for kind in LAYOUTS.values():
        grad = kind(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2)))
        if grad.shape == expected.shape:
            with backend(name):
                got = torch.autograd.grad(segment_film_gate(*arguments), leaves, grad)
            torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, grad, retain_graph=True))


@every_backend
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(name, data):
    shape = data.draw(st.tuples(*(st.integers(0, most) for most in (2, 5, 5, 6))), label="(B, C, H, W)")
    count = data.draw(st.integers(0, 18), label="segments")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    seed = data.draw(st.integers(0, 3), label="seed of the labels")
    batch, _, height, width = shape
    # labels of a wider map, which begin anywhere in it, and whose rows may lie anywhere
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(0, count + 1, (batch, height, 2 * width + seed), generator=generator, dtype=torch.uint8)
    segments = wide[:, :, seed::2][:, :, :width] if seed % 2 else wide[:, :, seed : seed + width]
    features, *small = shapes_of(shape, count)
    arguments = [data.draw(tensors(features, dtypes=(dtype,), expanded=True), label="features"), segments]
    for argument, size in zip(NAMES[1:], small, strict=True):
        arguments.append(data.draw(tensors(size, dtypes=(torch.float32, dtype), expanded=True), label=argument))
    check(name, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_b9_nothing_mixed_in_leaves_the_map_as_it_is(name, dtype, layout):
    """Weights, scale and shift of zero, a sample without an ECG: every value of the map comes out, to the last bit."""
    features = random_arguments((2, 3, 6, 5), dtype, needed=NOTHING)[0]
    features = LAYOUTS[layout](features * torch.logspace(-4, 4, 5)).to(dtype)
    _, segments, shared, scores, direction, *_ = random_arguments(tuple(features.shape), needed=NOTHING)
    nothing = torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 3)
    with backend(name):
        out = segment_film_gate(features, segments, 1e30 * shared, 1e30 * scores, direction, *nothing)
    assert torch.equal(out, features)


@every_backend
def test_k19_nan_and_infinity_stay_where_they_are(name):
    arguments = random_arguments(needed=NOTHING)
    features, segments, shared, scores, *_ = arguments
    arguments[5:7] = (value.abs() for value in arguments[5:7])  # inf - inf is NaN where the equations are written out
    segments[:] = 0
    segments[1, 2:] = 5
    features[1, 2, 0, 4], features[0, 0, 0, 0] = float("nan"), float("inf")
    shared[0, 1], scores[1, 4], scores[0, 6] = float("nan"), float("nan"), float("nan")  # the last one is nowhere
    with backend(name):
        out = segment_film_gate(*arguments)
    reference = segment_film_gate_reference(*arguments)
    assert out.isnan().sum() == 1 + 4 * 5 + 3 * 2 * 5
    assert torch.equal(out.isnan(), reference.isnan())
    assert torch.equal(out.isinf(), features.isinf())


@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_gradcheck_reference_and_cpu_path(layout):
    features, segments, *small = random_arguments((2, 3, 2, 2))
    features, *small = (value.detach().double() for value in (features, *small))
    arguments = [LAYOUTS[layout](features).requires_grad_(), segments, *(value.requires_grad_() for value in small)]
    for form in (segment_film_gate, segment_film_gate_reference):
        assert gradcheck(form, arguments)


def test_k3_float64_is_computed_in_float64():
    features, segments, *small = random_arguments((2, 3, 2, 2))
    arguments = [features.detach().double(), segments, *(value.detach().double() for value in small)]
    truth = segment_film_gate_reference(*arguments)
    torch.testing.assert_close(segment_film_gate(*arguments), truth, rtol=1e-15, atol=1e-15)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        segment_film_gate(*arguments)


@pytest.mark.slow  # one form of each operator: test_registered_operators.py
@interpreted
def test_opcheck():
    torch.library.opcheck(torch.ops.trifuse.segment_film_gate.default, random_arguments())
    features, *others = random_arguments(needed=NOTHING)
    grad, backward = torch.randn(2, 3, 4, 5), torch.ops.trifuse.segment_film_gate_backward.default
    for map_ in (features, LAYOUTS["channels last"](features)):
        torch.library.opcheck(backward, (grad, map_, *others, True))
    torch.library.opcheck(backward, (grad, features, *others, False))
    torch.library.opcheck(backward, (grad, None, *others, True))


@every_backend
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name):
    torch._dynamo.reset()
    compiled = torch.compile(segment_film_gate, fullgraph=True, backend="aot_eager", dynamic=True)
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for width in (5, 6, 9):
            arguments = random_arguments((2, 3, 4, width))
            leaves = leaves_of(arguments)
            got = torch.autograd.grad(compiled(*arguments).square().sum(), leaves)
            expected = torch.autograd.grad(segment_film_gate_reference(*arguments).square().sum(), leaves)
            torch.testing.assert_close(got, expected)


def test_compiled_code_looks_nothing_up():
    """The gradient of a look-up is scattered: by several threads, in no fixed order."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    torch.compile(segment_film_gate, fullgraph=True, backend=keep)(*random_arguments())
    assert "gather" not in graphs[0]
    assert "index" not in graphs[0]


def test_k7_fake_and_meta_tensors_give_shapes_without_data():
    shape = (2**8, 2**8, 2**8, 2**8)
    features, *small = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in shapes_of(shape))
    segments = torch.empty(2**8, 2**8, 2**8, device="meta", dtype=torch.uint8)
    out = segment_film_gate(features, segments, *small)
    assert (out.shape, out.dtype, out.device.type) == (shape, torch.bfloat16, "meta")
    with FakeTensorMode():
        arguments = random_arguments()
        segment_film_gate(*arguments).sum().backward()
        leaves = leaves_of(arguments)
        assert [value.grad.shape for value in leaves] == [value.shape for value in leaves]


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(mode):
    first, second = (random_arguments(needed=NOTHING, seed=seed) for seed in (0, 1))
    graph = make_fx(segment_film_gate, tracing_mode=mode)(*first)
    torch.testing.assert_close(graph(*second), segment_film_gate_reference(*second))


@every_backend
def test_k26_vmap_functional_and_forward_mode_differentiation(name):
    features, segments, shared, scores, *rest = random_arguments(needed=NOTHING)
    reference, several = segment_film_gate_reference, torch.stack([scores, -scores])

    def of_scores(scores, form=segment_film_gate):
        return form(features, segments, shared, scores, *rest)

    with backend(name):
        mapped = torch.vmap(of_scores)(several)
        relabelled = torch.vmap(lambda labels: segment_film_gate(features, labels, shared, scores, *rest))
        relabelled = relabelled(torch.stack([segments, 17 - segments]))
        _, pushed = torch.func.jvp(of_scores, (scores,), (torch.ones_like(scores),))
        pulled = torch.func.grad(lambda scores: of_scores(scores).square().sum())(scores)
    torch.testing.assert_close(mapped, torch.stack([of_scores(s, reference) for s in several]))
    torch.testing.assert_close(relabelled[1], reference(features, 17 - segments, shared, scores, *rest))
    direction, weights, scale, _ = rest
    along = (direction * weights[:, 1:] * (1 + scale))[:, :, None, None]
    torch.testing.assert_close(pushed, along * (segments > 0)[:, None])
    scores.requires_grad_()
    (expected,) = torch.autograd.grad(of_scores(scores, reference).square().sum(), scores)
    torch.testing.assert_close(pulled, expected)


@interpreted
@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_sums_are_made_in_parts(monkeypatch, layout):
    """More channels than the second launch takes at once, too, and more segments than are sorted at once."""
    maps, tuning, film = (
        import_module(f"trifuse.kernels.gpu.{name}") for name in ("maps", "tuning", "segment_film_gate_backward")
    )
    monkeypatch.setattr(maps, "TILE", 16)
    monkeypatch.setattr(maps, "TILES_PER_PART", 2)
    monkeypatch.setattr(maps, "MOST_CHANNELS", 2)
    monkeypatch.setattr(import_module("trifuse.kernels.gpu.segment_film_gate"), "PLANE_PIXELS", 8)
    monkeypatch.setattr(film, "TILES_PER_WALK", 1)
    monkeypatch.setattr(film, "CHANNELS_AT_ONCE", 2)
    monkeypatch.setattr(film, "PARTS_AT_ONCE", 2)
    parts = []

    def seen(*arguments):
        parts.append([len(sums) for sums in arguments[:2]])
        return small_gradients(*arguments)

    small_gradients = film._small_gradients
    monkeypatch.setattr(film, "_small_gradients", seen)
    features, *others = random_arguments((2, 5, 7, 11), torch.bfloat16)
    with tuning.forced(film.map_pass, {"pixels": 8}):
        check("triton", [LAYOUTS[layout](features.detach()).requires_grad_(), *others])
    assert all(of_channels > 1 and of_segments > of_channels for of_channels, of_segments in parts)
    assert parts
