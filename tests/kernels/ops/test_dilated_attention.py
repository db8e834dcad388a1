"""Dilated attention: values, every gradient, every layout, and every refusal, on all three backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import (
    BackendError,
    backend,
    dilated_attention,
    dilated_attention_reference,
    dilated_attention_weights,
)
from trifuse.kernels.ops.dilated_attention import packed_dilated_attention
from trifuse.kernels.testing import assert_op_matches, poisoned_empty, tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
# Plain PyTorch takes long to compile for any size, and is compiled as a block in tests/blocks.
COMPILED = (BACKENDS[0], pytest.param("torch", marks=pytest.mark.slow))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
THREE = {"num_heads": 3}
ONE = {"num_heads": 1, "dilations": (2,)}


def random_maps(b, h, w, c, dtype=torch.float32, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(b, h, w, c, generator=generator).to(dtype) for _ in range(3)]
    return [x.requires_grad_(requires_grad) for x in maps]


def check(name, *maps, op=dilated_attention, reference=dilated_attention_reference, **options):
    """Compare with the reference; sums over taps and channels are taken in another order than its own."""
    atol = 4 * torch.finfo(torch.float32).eps * max(64, maps[0].numel()) ** 0.5
    if name == "triton" and maps[0].dtype == torch.bfloat16:
        atol += 4 * torch.finfo(torch.bfloat16).eps  # the interpreter cuts off what a GPU rounds when it is stored
    with backend(name), poisoned_empty():
        assert_op_matches(op, reference, *maps, atol=atol, **options)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 1, 24), THREE),
        ((2, 5, 3, 24), ONE),
        ((1, 4, 7, 72), THREE),
        ((1, 13, 11, 10), {"num_heads": 2, "dilations": (1, 3)}),
        ((1, 3, 4, 40), ONE),
        ((1, 2, 3, 5), {"num_heads": 1, "dilations": (1,), "scale": 0.3}),
        ((1, 6, 5, 16), {"num_heads": 2, "dilations": (2, 1), "border": "mask"}),
        ((1, 7, 9, 16), {"num_heads": 2, "dilations": (2, 1), "border": "shift"}),
    ],
    ids=str,
)
def test_values_and_every_gradient(name, shape, options):
    """K13 to K15: single, odd and prime sizes, head widths that are no power of two and no multiple of 8."""
    check(name, *random_maps(*shape), **options)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_precision_loses_no_more_than_eager(name, dtype):
    check(name, *random_maps(1, 4, 5, 24, dtype=dtype), **ONE)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("packed_entry", [False, True])
def test_slices_of_one_packed_projection_are_read_where_they_lie(name, packed_entry, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(1, 4, 3, 72, generator=generator, requires_grad=True)
    split = lambda qkv: dilated_attention(*qkv.chunk(3, dim=-1), **THREE)  # noqa: E731
    op = (lambda qkv: packed_dilated_attention(qkv, **THREE)) if packed_entry else split
    truth = lambda qkv: dilated_attention_reference(*qkv.chunk(3, dim=-1), **THREE)  # noqa: E731
    check(name, packed, op=op, reference=truth)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a map was copied"))
    with backend(name):
        op(packed)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 6), (2, 0, 4, 6), (2, 3, 0, 6), (2, 3, 4, 0)], ids=str)
def test_k12_zero_size_gives_empty_values_and_gradients(name, shape):
    for border in ("zero", "mask"):
        maps = random_maps(*shape)
        with backend(name):
            out = dilated_attention(*maps, border=border, **THREE)
            out.sum().backward()
        assert out.shape == shape
        assert all(x.grad.shape == shape for x in maps)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("trained", ["", "q", "k", "v", "qv", "kv"])
def test_k22_only_the_gradients_asked_for(name, trained):
    maps = random_maps(1, 3, 4, 8, requires_grad=False)
    for x, letter in zip(maps, "qkv", strict=True):
        x.requires_grad_(letter in trained)
    check(name, *maps, **ONE)


@pytest.mark.parametrize("name", BACKENDS)
def test_k8_k10_strides_and_offsets(name):
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randn(2, 10, 8, 12, generator=generator) for _ in range(3)]
    views = (
        lambda x: x[:1, ::2, 1:, ::2],
        lambda x: x.permute(0, 3, 2, 1)[1:, :5, :4, :8],
        lambda x: x[:1, :4, :1, :4].expand(1, 4, 3, 4),
        lambda x: x.as_strided((1, 3, 4, 4), (0, 16, 4, 1), 1),
    )
    for view in views:
        check(name, *(view(x).detach().requires_grad_() for x in sources), **ONE)
    mixed = [views[0](sources[0]), sources[1][1:, :5, :7, :6], sources[2].permute(0, 3, 2, 1)[:1, :5, :7, :6]]
    check(name, *(x.detach().requires_grad_() for x in mixed), **ONE)


def drawn_case(data, smallest=0, wider=6, requires_grad=None):
    """Draw a call whose maps have any shape, layout and type, and any of them a gradient."""
    dilations = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2), label="dilations"))
    border = data.draw(st.sampled_from(["zero", "mask", "shift"]), label="border")
    least = 3 * max(dilations) if border == "shift" else smallest
    heads = len(dilations) * data.draw(st.integers(1, 2), label="heads of a dilation")
    sides = st.integers(least, least + wider)
    height, width = data.draw(sides, label="H"), data.draw(sides, label="W")
    batch, d = data.draw(st.integers(smallest, 2), label="B"), data.draw(st.integers(smallest, 9), label="d")
    shape = (batch, height, width, heads * d)
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    maps = [
        data.draw(tensors(shape, dtypes=(dtype,), requires_grad=requires_grad, expanded=True), label=x) for x in "qkv"
    ]
    scale = data.draw(st.sampled_from([None, 0.0, 0.7]), label="scale")
    return maps, {"num_heads": heads, "dilations": dilations, "border": border, "scale": scale}


@given(data=st.data())
@settings(max_examples=60)
def test_property_any_shape_layout_type_and_gradients(data):
    maps, options = drawn_case(data)
    check("torch", *maps, **options, kernel_size=3)


@interpreted
@given(data=st.data())
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])  # interpreted, shrinking would take minutes
def test_property_of_the_kernels(data):
    """Few examples, for an interpreted one takes seconds: none is empty, and each asks for every gradient."""
    maps, options = drawn_case(data, smallest=1, wider=3, requires_grad=True)
    check("triton", *maps, **options)


@given(data=st.data())
@settings(max_examples=20)
def test_property_weights_add_up_to_one_and_attention_stays_within_the_values(data):
    (q, k, v), options = drawn_case(data)
    weights = dilated_attention_weights(q, k, **options).double().sum(-1)
    eps = torch.finfo(q.dtype).eps
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=9 * eps, atol=0)
    out = dilated_attention(q, k, v, **options)
    if out.numel():
        assert out.abs().max() <= v.abs().max() * (1 + 4 * eps)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("border", ["zero", "mask"])
def test_k21_extreme_logits_do_not_overflow(name, border):
    q, k, v = random_maps(1, 2, 3, 8, dtype=torch.float16)
    q, k = ((x.detach() * 100).requires_grad_() for x in (q, k))
    logits = (q.float() * k.float()).sum(-1) * 8**-0.5
    assert logits.abs().max() > 1e4
    check(name, q, k, v, border=border, **ONE)
    check(name, q, (-q).detach(), v, border=border, **ONE)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("place", [(0, 0, 3), (0, 2, 0), (0, 4, 3)], ids=str)
def test_k19_nan_spreads_as_far_as_the_mathematics_takes_it(name, place):
    """A key at the edge of a row must not reach the other edge of the next, in values or gradients."""
    for which in range(3):
        maps = random_maps(2, 5, 4, 4)
        with torch.no_grad():
            maps[which][place] = torch.nan
        results = []
        for path in (name, "reference"):
            with backend(path):
                out = dilated_attention(*maps, num_heads=1, dilations=(1,))
            results.append([out, *torch.autograd.grad(out, maps, torch.ones(out.shape))])
        for mine, truth in zip(*results, strict=True):
            assert torch.equal(mine.isnan(), truth.isnan()), which
            assert not mine[1].isnan().any()


def test_gradcheck_reference_and_cpu_path():
    maps = [x.double().detach().requires_grad_() for x in random_maps(1, 3, 2, 4)]
    for op in (dilated_attention, dilated_attention_reference):
        for border in ("zero", "mask"):
            assert gradcheck(lambda *m, op=op, b=border: op(*m, num_heads=2, dilations=(1, 2), border=b), maps)


def test_k3_float64_is_computed_in_float64():
    maps = [x.double() for x in random_maps(1, 5, 4, 6, requires_grad=False)]
    for border in ("zero", "mask"):
        out = dilated_attention(*maps, border=border, **THREE)
        truth = dilated_attention_reference(*maps, border=border, **THREE)
        torch.testing.assert_close(out, truth, rtol=1e-13, atol=1e-14)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        dilated_attention(*maps, **THREE)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_other_windows_run_in_plain_pytorch_and_no_kernel_takes_them(name):
    maps = random_maps(1, 6, 5, 6)
    for border, size in (("zero", 5), ("mask", 1), ("shift", 5)):
        check(name, *maps, num_heads=1, dilations=(1,), kernel_size=size, border=border)
    with backend("triton"), pytest.raises(BackendError, match=r"kernel_size 3 only, got 5; use backend\('torch'\)"):
        dilated_attention(*maps, kernel_size=5, **THREE)
    with backend("triton"), pytest.raises(BackendError, match="dilated_attention_weights: no Triton kernel"):
        dilated_attention_weights(*maps[:2], **THREE)
    meta = [x.detach().to("meta") for x in maps]
    assert dilated_attention(*meta, kernel_size=5, **THREE).shape == maps[0].shape


@pytest.mark.slow  # one form of each operator: test_registered_operators.py
@interpreted
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    maps = random_maps(1, 3, 2, 8, requires_grad=False)
    maps = [torch.cat(maps, dim=-1)] if packed else maps
    arguments = (1, (2,), 0.5, "zero")
    leaves = [x.clone().requires_grad_() for x in maps]
    torch.library.opcheck(torch.ops.trifuse.dilated_attention.default, (leaves, *arguments))
    out, normaliser = torch.ops.trifuse.dilated_attention(maps, *arguments)
    backward = torch.ops.trifuse.dilated_attention_backward.default
    needed = [True] if packed else [True, False, True]
    torch.library.opcheck(backward, (torch.ones_like(out), maps, normaliser, *arguments, needed))


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name, packed):
    def attend(qkv):
        if packed:
            return packed_dilated_attention(qkv, **ONE)
        return dilated_attention(*qkv.chunk(3, dim=-1), **ONE)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for height in (4, 5, 7):
            qkv = torch.randn(1, height, 3, 12, requires_grad=True)
            out = compiled(qkv)
            (got,) = torch.autograd.grad(out.square().sum(), qkv)
            truth = dilated_attention_reference(*qkv.chunk(3, dim=-1), **ONE)
            torch.testing.assert_close(out, truth)
            torch.testing.assert_close(got, torch.autograd.grad(truth.square().sum(), qkv)[0])


def test_k7_fake_and_meta_tensors_give_shapes_without_data():
    huge = torch.empty(2**14, 2**8, 2**8, 3 * 24, device="meta", dtype=torch.bfloat16)
    for border in ("zero", "mask", "shift"):
        out = dilated_attention(huge, huge, huge, border=border, **THREE)
        assert (out.shape, out.dtype, out.device.type) == (huge.shape, torch.bfloat16, "meta")
    with FakeTensorMode():
        maps = [torch.empty(2, 5, 4, 6, requires_grad=True) for _ in range(3)]
        out = dilated_attention(*maps, **THREE)
        out.sum().backward()
        assert [out.shape, *(x.grad.shape for x in maps)] == [(2, 5, 4, 6)] * 4


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(mode):
    def attend(*maps):
        return dilated_attention(*maps, **THREE)

    graph = make_fx(attend, tracing_mode=mode)(*random_maps(1, 3, 4, 6, requires_grad=False))
    maps = random_maps(1, 3, 4, 6, seed=1, requires_grad=False)
    torch.testing.assert_close(graph(*maps), dilated_attention_reference(*maps, **THREE))


@pytest.mark.parametrize("name", BACKENDS)
def test_k26_vmap_functional_and_forward_mode_differentiation(name):
    q, k, v = random_maps(1, 3, 4, 6, requires_grad=False)
    many = torch.stack([q, q + 1, -q])
    with backend(name):
        mapped = torch.vmap(lambda x: dilated_attention(x, k, v, **THREE))(many)
        _, pushed = torch.func.jvp(lambda x: dilated_attention(q, k, x, **THREE), (v,), (v,))
        pulled = torch.func.grad(lambda x: dilated_attention(x, k, v, **THREE).square().sum())(q)
    truth = dilated_attention_reference(q, k, v, **THREE)
    torch.testing.assert_close(mapped, torch.stack([dilated_attention_reference(x, k, v, **THREE) for x in many]))
    torch.testing.assert_close(pushed, truth)
    q.requires_grad_()
    dilated_attention_reference(q, k, v, **THREE).square().sum().backward()
    torch.testing.assert_close(pulled, q.grad)
