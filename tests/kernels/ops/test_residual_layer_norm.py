"""Residual sum and layer norm: values, every gradient, every width and layout of tokens, on all backends."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from forms import asked_gradients, with_every_type
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from trifuse.kernels import backend, residual_layer_norm, residual_layer_norm_reference
from trifuse.kernels.testing import assert_op_matches, launches, poisoned_empty, tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_backend = pytest.mark.parametrize("name", BACKENDS)
# The widths of the networks; odd and prime ones, one channel, one token, no axis of tokens
SHAPES = [
    *((2, 3, width) for width in (72, 144, 288, 384, 768, 1024, 1536)),
    (2, 3, 5, 7),
    (1, 1, 13),
    (3, 4, 1),
    (5, 24),
    (2, 1, 2, 3, 6),
]
LAYOUTS = {
    "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "without the first token": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "some channels": lambda x: torch.cat([x, x], -1)[..., 1 : x.shape[-1] + 1],
    "every second channel": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one token for all samples": lambda x: x[:1].expand_as(x),
}
GIVEN = ("branch", "weight", "bias", "layer_scale", "sample_scale")


def arguments(shape, dtype=torch.float32, *, given=GIVEN, needed=(True,) * 5, seed=0):
    """The tensors and the options of a call; what is not given is None."""
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(zip(("x", *GIVEN), (shape, shape, *[shape[-1:]] * 3, shape[:1]), strict=True))
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    for name in ("x", "branch"):
        drawn[name] = drawn[name].to(dtype)
    for name, need in zip(("x", *GIVEN[:4]), needed, strict=True):
        drawn[name].requires_grad_(need)
    kept = {name: value if name in ("x", *given) else None for name, value in drawn.items()}
    options = {name: kept.pop(name) for name in ("layer_scale", "sample_scale")}
    return [*kept.values()], options


def check(name, tensors, options, *, eps=1e-2):
    """Compare with the reference: what is normalised was rounded, as the sum; gradients are sums over all tokens."""
    dtype, elements = tensors[0].dtype, max(4, tensors[0].numel())
    unit = torch.finfo(torch.float32).eps
    largest = 16 if dtype == torch.float32 else 48
    atol = largest * torch.finfo(dtype).eps + 16 * unit * elements**0.5
    if dtype != torch.float32:
        atol += 2 * torch.finfo(dtype).eps * elements**0.5
    with backend(name), poisoned_empty():
        operator, reference = residual_layer_norm, residual_layer_norm_reference
        assert_op_matches(operator, reference, *tensors, **options, atol=atol, eps=eps)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs, each of several tiles, and gradients of weights in more parts than are added up at once."""
    forward = import_module("trifuse.kernels.gpu.residual_layer_norm")
    backward = import_module("trifuse.kernels.gpu.residual_layer_norm_backward")
    monkeypatch.setattr(forward, "TILE", 32)
    monkeypatch.setattr(forward, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(backward, "LEAST_TILES", 2)
    monkeypatch.setattr(backward, "PARTS_AT_ONCE", 2)
    monkeypatch.setattr(backward, "CHANNELS_AT_ONCE", 4)


def test_reference_matches_pytorch():
    (x, branch, weight, bias), options = arguments((2, 3, 8))
    total = x + branch * options["layer_scale"] * options["sample_scale"][:, None, None]
    expected = total, F.layer_norm(total, (8,), weight, bias, 1e-3)
    torch.testing.assert_close(residual_layer_norm_reference(x, branch, weight, bias, eps=1e-3, **options), expected)
    torch.testing.assert_close(residual_layer_norm_reference(x), (x, F.layer_norm(x, (8,))))


def test_reference_matches_definition():
    (x, branch, weight, bias), options = arguments((2, 3, 4))
    found = residual_layer_norm_reference(
        x.double(),
        branch.double(),
        weight.double(),
        bias.double(),
        eps=1e-3,
        **{k: v.double() for k, v in options.items()},
    )
    scale, kept = (options[name].double() for name in ("layer_scale", "sample_scale"))
    for b, m in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        token = x[b, m].double() + scale * kept[b] * branch[b, m].double()
        torch.testing.assert_close(found[0][b, m], token)
        mean = token.sum() / 4
        deviation = ((token - mean).square().sum() / 4 + 1e-3) ** 0.5
        torch.testing.assert_close(found[1][b, m], (token - mean) / deviation * weight.double() + bias.double())


@every_backend
@pytest.mark.parametrize(("shape", "dtype"), with_every_type([(shape,) for shape in SHAPES], DTYPES, 0), ids=str)
def test_values_and_every_gradient(name, dtype, shape):
    """K14: odd, prime and single sizes among them."""
    check(name, *arguments(shape, dtype))


@every_backend
@pytest.mark.parametrize(
    "given",
    [(), ("weight",), ("bias",), ("branch",), ("branch", "layer_scale", "bias"), ("branch", "sample_scale", "weight")],
    ids=str,
)
def test_whatever_is_absent(name, given):
    check(name, *arguments((2, 5, 12), given=given))


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 8)], ids=str)
def test_k12_zero_size(name, shape):
    tensors, options = arguments(shape)
    with backend(name):
        results = residual_layer_norm(*tensors, **options)
        sum(result.sum() for result in results).backward()
    assert all(result.shape == shape for result in results)
    for value in (*tensors, options["layer_scale"]):
        assert torch.equal(value.grad, torch.zeros_like(value))


@every_backend
@pytest.mark.parametrize("needed", asked_gradients(5))
@pytest.mark.parametrize("given", [GIVEN, GIVEN[:3]], ids=["factors", "none"])
def test_k22_only_the_gradients_asked_for(name, needed, given):
    tensors, options = arguments((2, 5, 12), given=given, needed=needed)
    check(name, tensors, options)
    leaves = [*tensors, options["layer_scale"]]
    if any(value is not None and value.requires_grad for value in leaves):
        with backend(name):
            sum(result.sum() for result in residual_layer_norm(*tensors, **options)).backward()
    for value, need in zip(leaves, needed, strict=True):
        assert value is None or (value.grad is not None) == need


@every_backend
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_where_only_one_result_is_used(name, used):
    tensors, options = arguments((2, 5, 12))
    check(name, tensors, options)

    def grads(form):
        loss = form(*tensors, **options)[used].square().sum()
        return torch.autograd.grad(loss, [*tensors, options["layer_scale"]], allow_unused=True, materialize_grads=True)

    with backend(name):
        torch.testing.assert_close(grads(residual_layer_norm), grads(residual_layer_norm_reference))


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_k8_k9_k10_strides_and_offsets(name, layout, dtype):
    (x, branch, *affine), options = arguments((2, 3, 4, 16), dtype)
    x, branch = (LAYOUTS[layout](value.detach()).requires_grad_() for value in (x, branch))
    check(name, [x, branch, *affine], options)
    strided = [torch.stack([value, value], -1)[..., 1].detach().requires_grad_() for value in affine]
    strided_options = {name: torch.stack([value, value], -1)[..., 1].detach() for name, value in options.items()}
    check(name, [x, branch, *strided], strided_options)
    if name == "triton":
        with backend(name):
            assert all(result.is_contiguous() for result in residual_layer_norm(x, branch, *affine))


@interpreted
@pytest.mark.parametrize("shape", [(3, 11, 24), (2, 9, 13), (1, 40, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_several_tiles_of_several_programs(small_tiles, shape, dtype):
    check("triton", *arguments(shape, dtype))


@every_backend
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_k2_terms_of_two_types(name, types):
    """A residual in float32 and a branch in autocast's type: each gradient in its argument's own."""
    (x, branch, *affine), options = arguments((2, 5, 24))
    x, branch = (v.detach().to(t).requires_grad_() for v, t in zip((x, branch), types, strict=True))
    with backend(name):
        results = residual_layer_norm(x, branch, *affine, **options)
        assert [result.dtype for result in results] == [types[0]] * 2
        assert_op_matches(residual_layer_norm, residual_layer_norm_reference, x, branch, *affine, **options, atol=3e-2)
        check(name, [x, branch, *affine], {})


@every_backend
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(name, data):
    shape = data.draw(st.tuples(*(st.integers(0, most) for most in (3, 4, 20))), label="(B, M, C)")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    x, branch = (data.draw(tensors(shape, dtypes=(dtype,), expanded=True), label=label) for label in ("x", "branch"))
    kind = data.draw(st.sampled_from([torch.float32, dtype]), label="type of weights and factors")
    wanted = data.draw(st.tuples(*[st.booleans()] * 3), label="layer_scale, sample_scale, affine")
    factor = torch.full(shape[2:], 0.5, dtype=kind).requires_grad_() if wanted[0] else None
    kept = torch.arange(shape[0], dtype=kind) if wanted[1] else None
    affine = [torch.full(shape[2:], 0.25, dtype=kind).requires_grad_() if wanted[2] else None for _ in range(2)]
    check(name, [x, branch, *affine], {"layer_scale": factor, "sample_scale": kept}, eps=1.0)


@pytest.mark.parametrize("form", [residual_layer_norm, residual_layer_norm_reference])
def test_gradcheck_reference_and_cpu_path(form):
    tensors, options = arguments((2, 2, 3))
    tensors = [value.detach().double().requires_grad_() for value in tensors]
    scale, kept = options["layer_scale"].detach().double().requires_grad_(), options["sample_scale"].double()
    assert gradcheck(lambda *v: form(*v[:4], layer_scale=v[4], sample_scale=kept), [*tensors, scale])
    assert gradcheck(lambda x, w, b: form(x, None, w, b)[1], [tensors[0], *tensors[2:]])


@every_backend
def test_a_large_mean_costs_no_digits_of_the_variance(name):
    """The mean of squares less the squared mean would be zero, or less, in float32."""
    x = 1e4 + torch.randn((2, 3, 96), generator=torch.Generator().manual_seed(0))
    expected = residual_layer_norm_reference(x.double())[1].float()
    with backend(name):
        torch.testing.assert_close(residual_layer_norm(x)[1], expected, atol=2e-2, rtol=0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_normalised_is_the_sum_that_is_returned(name, dtype):
    (x, branch, *affine), options = arguments((2, 5, 24), dtype)
    with backend(name):
        total, normalised = residual_layer_norm(x, branch, *affine, **options)
        again = residual_layer_norm(total, None, *affine)
    assert again[0] is total
    assert torch.equal(again[1], normalised)


@every_backend
def test_results_repeat_bit_for_bit(name):
    def run():
        tensors, options = arguments((2, 33, 20))
        with backend(name):
            results = residual_layer_norm(*tensors, **options)
        loss = sum(result.square().sum() for result in results)
        return [*results, *torch.autograd.grad(loss, [*tensors, options["layer_scale"]])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@interpreted
def test_launches():
    """One each way, and one that adds up the gradients of weights; none of them where nobody asks for those."""
    for needed, last in (((True,) * 5, {"_add_token_sums_kernel": 1}), ((True, True, False, False, False), {})):
        with backend("triton"), launches() as counted:
            tensors, options = arguments((2, 5, 12), needed=needed)
            sum(result.sum() for result in residual_layer_norm(*tensors, **options)).backward()
        assert counted.kernels == {"_residual_layer_norm_fwd_kernel": 1, "_residual_layer_norm_bwd_kernel": 1, **last}


@interpreted
def test_channels_are_moved_in_the_widest_units_that_fit():
    gpu = import_module("trifuse.kernels.gpu.residual_layer_norm")
    tokens = torch.empty(2, 5, 96)
    sliced = [tokens[..., :72], tokens[..., :12], tokens[:, 1:], tokens[..., :7]]
    assert [gpu.unit_of(part) for part in sliced] == [8, 4, 8, 1]
    assert gpu.unit_of(tokens, torch.empty(2, 5, 102)[..., :96]) == 2
