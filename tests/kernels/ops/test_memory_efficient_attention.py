"""Attention: values, every gradient, layouts and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from attention_arguments import check, random_arguments, random_bias
from forms import with_every_type
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck
from torch.nn import functional as F

from trifuse.kernels import ShapeError, backend
from trifuse.kernels.ops.memory_efficient_attention import (
    memory_efficient_attention,
    memory_efficient_attention_reference,
)
from trifuse.kernels.testing import assert_op_matches, peak_memory_bytes, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (B, M_q, M_k, h, d): one of everything, odd and prime sizes, head widths that no power of two divides, many keys
SHAPES = [(1, 1, 1, 1, 1), (2, 5, 7, 3, 8), (1, 7, 5, 2, 24), (2, 3, 131, 1, 40), (1, 65, 65, 2, 64)]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_reference_matches_definition(scale):
    q, k, v = random_arguments(2, 3, 4, 2, 5, requires_grad=False)
    bias = random_bias(2, 2, 3, 4).detach()
    expected = torch.zeros(2, 3, 2, 5)
    for b in range(2):
        for a in range(2):
            for i in range(3):
                scores = [
                    float(q[b, i, a] @ k[b, j, a]) * (scale or 5**-0.5) + float(bias[b, a, i, j]) for j in range(4)
                ]
                total = sum(math.exp(score) for score in scores)
                expected[b, i, a] = sum(math.exp(score) / total * v[b, j, a] for j, score in enumerate(scores))
    result = memory_efficient_attention_reference(q, k, v, scale=scale, attn_bias=bias)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(("shape", "dtype"), with_every_type([(shape,) for shape in SHAPES], DTYPES), ids=str)
def test_values_and_every_gradient(dtype, shape):
    """K14, K15: odd and prime sizes, head widths that are no power of two."""
    check(*random_arguments(*shape, dtype=dtype), atol=1e-13 if dtype == torch.float64 else None)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 1, 1, 7), (1, 3, 5, 1), (5, 7), (7,), ()], ids=str)
def test_every_broadcastable_bias_and_its_gradient(shape):
    q, k, v = random_arguments(2, 5, 7, 3, 8)
    check(q, k, v, attn_bias=random_bias(*shape), scale=0.7, atol=1e-6)


@pytest.mark.parametrize("op", [memory_efficient_attention, memory_efficient_attention_reference])
def test_a_scale_of_zero_is_a_scale_and_attends_to_all_keys_alike(op):
    q, k, v = random_arguments(2, 3, 5, 2, 8, requires_grad=False)
    expected = v.mean(1, keepdim=True).expand_as(q)
    torch.testing.assert_close(op(q, k, v, scale=0.0), expected)


@pytest.mark.parametrize("trained", [(), "q", "k", "v", "qv"], ids=str)
def test_k22_only_the_gradients_asked_for(trained):
    arguments = random_arguments(1, 4, 6, 2, 8, requires_grad=False)
    for name in trained:
        arguments["qkv".index(name)].requires_grad_()
    check(*arguments)


@pytest.mark.parametrize("empty", [0, 1, 2, 3, 4], ids=["B", "M_q", "M_k", "h", "d"])
def test_k12_k37_zero_size(empty, monkeypatch):
    """Without keys there is nothing to attend to, and the result is zeros; all other cases are empty.

    No one else's kernel is asked: that of torch 2.10 ends the process.
    """
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("SDPA was called"))
    shape = [2, 3, 4, 2, 8]
    shape[empty] = 0
    for name in ("torch", "reference"):
        q, k, v = random_arguments(*shape)
        with backend(name):
            out = memory_efficient_attention(q, k, v)
        out.sum().backward()
        assert torch.equal(out, torch.zeros_like(q))
        assert all(not argument.grad.any() for argument in (q, k, v))
    bias = torch.zeros(q.shape[1], k.shape[1], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = memory_efficient_attention(q, k, v, attn_bias=bias)
        out.sum().backward()
        assert memory_efficient_attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert not bias.grad.any()


def test_k8_k9_k10_slices_of_one_projection():
    """As a block calls it: strided views at an odd offset, and an incoming gradient of stride zero."""
    packed = torch.randn(2, 9, 3 * 2 * 8 + 1, generator=torch.Generator().manual_seed(0))[..., 1:].requires_grad_()

    def attend(x, op=memory_efficient_attention):
        return op(*x.unflatten(-1, (3, 2, 8)).unbind(-3))

    assert_op_matches(attend, lambda x: attend(x, memory_efficient_attention_reference), packed)


@st.composite
def arguments(draw):
    b, m_q, m_k, h, d = draw(st.tuples(*(st.integers(1, n) for n in (2, 6, 9, 3, 9))))
    dtype = draw(st.sampled_from(DTYPES[:3]))
    shapes = ((b, m_q, h, d), (b, m_k, h, d), (b, m_k, h, d))
    q, k, v = (draw(tensors(shape, dtypes=[dtype], expanded=True)) for shape in shapes)
    bias = draw(
        st.none() | tensors((draw(st.sampled_from((1, b))), h, draw(st.sampled_from((1, m_q))), m_k), dtypes=[dtype])
    )
    return q, k, v, bias


@given(arguments())
def test_property_any_shape_layout_type_and_gradients(drawn):
    q, k, v, bias = drawn
    check(q, k, v, attn_bias=bias, atol=4 * torch.finfo(q.dtype).eps)


@given(st.permutations(range(6)), st.integers(0, 100))
def test_property_order_of_keys_does_not_matter(order, seed):
    q, k, v = random_arguments(2, 3, 6, 2, 8, seed=seed, requires_grad=False)
    shuffled = memory_efficient_attention(q, k[:, order], v[:, order])
    torch.testing.assert_close(shuffled, memory_efficient_attention(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", [memory_efficient_attention, memory_efficient_attention_reference])
def test_gradcheck(op):
    q, k, v = random_arguments(1, 3, 4, 2, 3, dtype=torch.float64)
    bias = random_bias(1, 2, 1, 4, dtype=torch.float64)
    assert gradcheck(lambda q, k, v, bias: op(q, k, v, attn_bias=bias, scale=0.5), (q, k, v, bias))


def test_k2_k3_result_has_the_type_of_the_queries():
    for dtype in DTYPES:
        q, k, v = random_arguments(1, 2, 3, 1, 8, dtype=dtype)
        assert memory_efficient_attention(q, k, v).dtype == dtype
        assert memory_efficient_attention_reference(q, k, v).dtype == dtype


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_k20_query_that_may_see_nothing_gets_zeros_and_finite_gradients(name):
    q, k, v = random_arguments(2, 3, 4, 2, 8)
    bias = torch.zeros(2, 2, 3, 4)
    bias[0, 1, 2] = -math.inf
    with backend(name):
        out = memory_efficient_attention(q, k, v, attn_bias=bias)
        out.square().sum().backward()
    assert not out[0, 2, 1].any()
    assert out[0, 2, 0].all()
    assert all(argument.grad.isfinite().all() for argument in (q, k, v))


def test_k21_large_scores_do_not_overflow():
    """Scores near 1e5 leave float16's range; only the largest counts, so the result is the value of its key."""
    q = torch.full((1, 1, 1, 8), 100.0, dtype=torch.float16)
    k = torch.stack([q[0] * f for f in (1.0, 2.0, -1.0)], dim=1)
    v = torch.randn(1, 3, 1, 8, generator=torch.Generator().manual_seed(0)).half()
    for op in (memory_efficient_attention, memory_efficient_attention_reference):
        assert torch.equal(op(q, k, v)[0, 0], v[0, 1])


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_k19_nan_stays_in_its_sample_and_head(name):
    """With fewer than a vector's width of keys, PyTorch's CPU kernel takes a NaN query for one that may see nothing."""
    q, k, v = random_arguments(2, 3, 64, 2, 8, requires_grad=False)
    q[1, 2, 0, 5] = math.nan
    with backend(name):
        bad = memory_efficient_attention(q, k, v).isnan()
    assert bad.sum() == 8
    assert bad[1, 2, 0].all()


def test_k23_second_differentiation_is_right_or_refused():
    q, k, v = random_arguments(1, 2, 3, 1, 4)
    (first,) = torch.autograd.grad(memory_efficient_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        first.sum().backward()
    (first,) = torch.autograd.grad(memory_efficient_attention_reference(q, k, v).square().sum(), q, create_graph=True)
    first.sum().backward()
    assert q.grad.abs().sum() > 0


def test_k24_nothing_is_saved_where_nothing_is_differentiated():
    q, k, v = random_arguments(1, 4, 5, 2, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        with torch.no_grad():
            memory_efficient_attention(q, k, v)
        with torch.inference_mode():
            memory_efficient_attention(q, k, v)
        assert saved == []
        memory_efficient_attention(q, k, v)
    assert sum(tensor.numel() for tensor in saved) < 2 * (q.numel() + k.numel() + v.numel())


def test_memory_is_linear_in_the_number_of_tokens():
    """The score matrix alone would be 16 MiB here."""
    q, k, v = random_arguments(1, 2048, 2048, 1, 8, requires_grad=False)
    with torch.no_grad():
        assert peak_memory_bytes(lambda: memory_efficient_attention(q, k, v)) < 4 << 20
        assert peak_memory_bytes(lambda: memory_efficient_attention_reference(q, k, v)) >= 16 << 20


def test_k25_autocast_is_followed():
    q, k, v = random_arguments(1, 3, 4, 2, 8, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = memory_efficient_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), memory_efficient_attention(q, k, v), atol=2e-2, rtol=2e-2)


def test_k26_vmap_functional_and_forward_mode_differentiation():
    q, k, v = random_arguments(3, 4, 5, 2, 8, requires_grad=False)
    expected = memory_efficient_attention_reference(q, k, v)
    mapped = torch.vmap(memory_efficient_attention)(q[:, None], k[:, None], v[:, None])
    torch.testing.assert_close(mapped[:, 0], expected)
    _, pushed = torch.func.jvp(lambda v: memory_efficient_attention(q, k, v), (v,), (v,))
    torch.testing.assert_close(pushed, expected)  # linear in the values
    with forward_ad.dual_level():
        dual = memory_efficient_attention(q, k, forward_ad.make_dual(v, v))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    pulled = torch.func.grad(lambda q: memory_efficient_attention(q, k, v).square().sum())(q)
    q.requires_grad_()
    memory_efficient_attention_reference(q, k, v).square().sum().backward()
    torch.testing.assert_close(pulled, q.grad)


@pytest.mark.parametrize("with_bias", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_k27_compiles_to_one_graph_with_dynamic_shapes(with_bias):
    def attend(q, k, v, bias):
        return memory_efficient_attention(q, k, v, attn_bias=bias)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 6, 9):
            q, k, v = random_arguments(2, m, m + 1, 2, 8)
            bias = random_bias(2, m, m + 1) if with_bias else None
            got = torch.autograd.grad(compiled(q, k, v, bias).square().sum(), (q, k, v))
            out = memory_efficient_attention_reference(q, k, v, attn_bias=bias)
            torch.testing.assert_close(got, torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_k7_meta_tensors_give_shapes_without_data():
    q, k, v = (torch.empty(2**12, 2**10, 2**4, 2**6, device="meta", dtype=torch.bfloat16) for _ in range(3))
    out = memory_efficient_attention(q, k, v)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "meta")


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_dropout_drops_weights_and_keeps_the_mean(name):
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 4000, 1, 4)
    v = torch.ones(1, 4000, 1, 4)
    with backend(name), torch.random.fork_rng():
        torch.manual_seed(0)
        first = memory_efficient_attention(q, k, v, dropout_p=0.25)
        second = memory_efficient_attention(q, k, v, dropout_p=0.25)
        torch.manual_seed(0)
        assert torch.equal(memory_efficient_attention(q, k, v, dropout_p=0.25), first)
    assert not torch.equal(first, second)
    # each of 4000 weights of 1/4000 is kept with probability 3/4 and then scaled by 4/3: deviation 0.009
    torch.testing.assert_close(first, torch.ones_like(first), atol=0.05, rtol=0)
    assert torch.equal(memory_efficient_attention(q, k, v), torch.ones_like(q))


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "attn_bias"])
def test_k1_k4_refuses_types_it_cannot_compute_in(name, bad):
    q, k, v = random_arguments(1, 2, 3, 1, 4, requires_grad=False)
    arguments = {"q": q, "k": k, "v": v, "attn_bias": torch.zeros(2, 3)}
    arguments[name] = arguments[name].to(bad)
    with pytest.raises(TypeError, match=rf"memory_efficient_attention: {name} is torch\..*expected one of float32"):
        memory_efficient_attention(**arguments)


def test_k2_mixed_types_are_refused():
    q, k, v = random_arguments(1, 2, 3, 1, 4, requires_grad=False)
    with pytest.raises(TypeError, match=r"q is torch.float32, k is torch.float16, v is torch.float32"):
        memory_efficient_attention(q, k.half(), v)
    with pytest.raises(TypeError, match=r"attn_bias is torch.float64"):
        memory_efficient_attention(q, k, v, attn_bias=torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"expected q of shape \(B, M, h, d\), got \(2, 3, 4\)"),
        ({"k": torch.zeros(2, 4, 2, 9)}, r"got q \(2, 3, 2, 8\), k \(2, 4, 2, 9\), v \(2, 4, 2, 8\)"),
        ({"v": torch.zeros(2, 5, 2, 8)}, r"v \(2, 5, 2, 8\)"),
        ({"q": torch.zeros(1, 3, 2, 8)}, r"q \(1, 3, 2, 8\)"),
        ({"q": torch.zeros(2, 3, 4, 8)}, r"q \(2, 3, 4, 8\)"),
        ({"v": torch.zeros(2, 4, 2, 8, device="meta")}, "q on cpu, k on cpu, v on meta"),
        ({"attn_bias": torch.zeros(3, 5)}, r"broadcastable to \(B, h, M_q, M_k\) = \(2, 2, 3, 4\), got \(3, 5\)"),
        ({"attn_bias": torch.zeros(1, 2, 2, 3, 4)}, r"got \(1, 2, 2, 3, 4\)"),
    ],
)
def test_k5_refuses_what_does_not_fit(change, message):
    arguments = dict(zip("qkv", random_arguments(2, 3, 4, 2, 8, requires_grad=False), strict=True))
    with pytest.raises(ShapeError, match=message):
        memory_efficient_attention(**arguments | change)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, math.nan])
def test_refuses_impossible_dropout(dropout_p):
    with pytest.raises(ValueError, match=r"expected dropout_p in \[0, 1\)"):
        memory_efficient_attention(*random_arguments(1, 2, 3, 1, 4), dropout_p=dropout_p)
