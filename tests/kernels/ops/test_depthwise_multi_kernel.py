"""Depthwise multi-kernel convolution: values, every gradient, every layout, and every refusal, on all backends."""

from __future__ import annotations

import copy

import pytest
import torch
from depthwise_arguments import BACKENDS, check, interpreted, random_arguments
from forms import with_every_type
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from trifuse.kernels import BackendError, ShapeError, backend, depthwise_multi_kernel, depthwise_multi_kernel_reference
from trifuse.kernels.testing import tensors

pytestmark = pytest.mark.usefixtures("low_tiles")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (B, C, H, W) and the kernels' sides: one of everything, maps smaller than the kernels, odd and prime sizes, several
# tiles each way, more channels than one block holds, one kernel alone, three of which two are equal
CASES = [
    ((1, 1, 1, 1), (1,)),
    ((2, 3, 2, 3), (5, 7)),
    ((2, 17, 5, 7), (1, 3)),
    ((1, 2, 5, 67), (3, 3, 1)),
    ((1, 300, 2, 3), (3,)),
]


def test_reference_matches_definition():
    """A loop over output pixels and taps; taps outside the map count nothing."""
    x, weights = random_arguments((1, 2, 3, 4), (3, 5))
    expected = x.detach().clone()
    for weight in weights:
        rim = weight.shape[-1] // 2
        for c, h, w in [(c, h, w) for c in range(2) for h in range(3) for w in range(4)]:
            for i, j in [(i, j) for i in range(2 * rim + 1) for j in range(2 * rim + 1)]:
                if 0 <= h + i - rim < 3 and 0 <= w + j - rim < 4:
                    expected[0, c, h, w] += weight[c, 0, i, j].item() * x[0, c, h + i - rim, w + j - rim].item()
    torch.testing.assert_close(depthwise_multi_kernel_reference(x, weights), expected)
    without = depthwise_multi_kernel_reference(x, weights, residual=False)
    torch.testing.assert_close(without, expected - x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("shape", "sides", "dtype"), with_every_type(CASES, DTYPES, at=2), ids=str)
def test_values_and_every_gradient(name, dtype, shape, sides):
    """K14: odd, prime and single sizes among them."""
    check(name, *random_arguments(shape, sides, dtype=dtype))


@pytest.mark.parametrize("name", BACKENDS)
def test_k13_tiles_of_the_size_that_runs_on_a_gpu(name, monkeypatch):
    monkeypatch.undo()
    check(name, *random_arguments((1, 2, 5, 6), (5, 7)), residual=False)


@pytest.mark.parametrize("name", BACKENDS)
def test_each_part_gets_the_gradient_of_its_own_convolution(name):
    """PyTorch differentiates each convolution on its own; here the gradients are cut from one."""
    x, weights = random_arguments((2, 3, 4, 5), (1, 3, 5))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with backend(name):
        got = torch.autograd.grad(depthwise_multi_kernel(x, weights, residual=False), weights, grad)
    for mine, weight in zip(got, weights, strict=True):
        alone = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=3)
        torch.testing.assert_close(mine, torch.autograd.grad(alone, weight, grad)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_k12_zero_size_gives_empty_values_and_zero_gradients(name, shape):
    x, weights = random_arguments(shape, (3, 5))
    with backend(name):
        out = depthwise_multi_kernel(x, weights)
        out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in weights)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("x_grad", [False, True])
@pytest.mark.parametrize("trained", [(), (0,), (1,), (0, 1)], ids=str)
def test_k22_only_the_gradients_asked_for(name, x_grad, trained):
    x, weights = random_arguments((1, 2, 3, 4), (1, 3), x_grad=x_grad, weights_grad=False)
    for i in trained:
        weights[i].requires_grad_()
    check(name, x, weights)
    if trained or x_grad:
        with backend(name):
            depthwise_multi_kernel(x, weights).sum().backward()
        assert [weight.grad is not None for weight in weights] == [i in trained for i in range(2)]
        assert (x.grad is not None) == x_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_k8_strides_and_offsets(name):
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(2, 8, 9, 10, generator=generator)
    _, weights = random_arguments((1, 4, 1, 1), (3,))
    for view in (
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, :4, :3, :5],  # channels of a wider map
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, 1:5, 1:4, 2:7],  # and not at its start
        lambda x: x[:, 1::2, ::3, ::2],
        lambda x: x.transpose(2, 3)[:, :4, :3, :5],
        lambda x: x[:, :1, :3, :1].expand(2, 4, 3, 5),
    ):
        check(name, view(wide).detach().requires_grad_(), weights)
    turned = torch.randn(3, 3, 1, 4, generator=generator).permute(3, 2, 0, 1).requires_grad_()
    check(name, view(wide).detach(), [turned])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_result_and_gradient_keep_the_memory_format(name, memory_format):
    x, weights = random_arguments((2, 4, 3, 5), (3,))
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    with backend(name):
        out = depthwise_multi_kernel(x, weights)
        meta = depthwise_multi_kernel(x.to("meta"), [weight.to("meta") for weight in weights])
    out.backward(torch.ones_like(x))
    for result in (out, meta, x.grad):
        assert result.is_contiguous(memory_format=memory_format)


@interpreted
@given(data=st.data())
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])  # interpreted, shrinking would take minutes
def test_property_of_the_kernels(data):
    check("triton", **drawn_case(data))


@given(data=st.data())
@settings(max_examples=60)
def test_property_any_shape_layout_type_and_gradients(data):
    check("torch", **drawn_case(data))


def drawn_case(data):
    """Draw a map and kernels of any shape, layout and type, each with a gradient or without."""
    sides = data.draw(st.lists(st.sampled_from((1, 3, 5)), min_size=1, max_size=3), label="kernels")
    batch, width = data.draw(st.integers(0, 2), label="B"), data.draw(st.integers(1, 6), label="W")
    shape = (batch, data.draw(st.integers(1, 4), label="C"), data.draw(st.integers(1, 3), label="H"), width)
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    x = data.draw(tensors(shape, dtypes=(dtype,), expanded=True), label="x")
    kinds = tensors(st.just(()), dtypes=DTYPES)
    weights = []
    for i, side in enumerate(sides):
        kind = data.draw(kinds, label=f"kind of kernel {i}")
        generator = torch.Generator().manual_seed(i)
        weight = torch.randn(shape[1], 1, side, side, generator=generator).to(kind.dtype)
        weights.append(weight.requires_grad_(kind.requires_grad))
    return {"x": x, "weights": weights, "residual": data.draw(st.booleans(), label="residual")}


@given(tensors(st.tuples(st.integers(1, 2), st.just(2), st.integers(1, 6), st.integers(1, 6)), requires_grad=False))
def test_property_adding_kernels_is_adding_results(x):
    _, (first, second) = random_arguments((1, 2, 1, 1), (3, 7), x_grad=False, weights_grad=False)
    both = depthwise_multi_kernel(x, [first, second])
    apart = depthwise_multi_kernel(x, [first]) + depthwise_multi_kernel(x, [second], residual=False)
    torch.testing.assert_close(both, apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_k19_nan_stays_under_the_kernel(name):
    x, weights = random_arguments((2, 2, 6, 7), (1, 3), x_grad=False, weights_grad=False)
    x[1, 0, 2, 6] = float("nan")
    with backend(name):
        out = depthwise_multi_kernel(x, weights)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[1, 0, 1:4, 5:7] = True
    assert torch.equal(out.isnan(), expected)


def test_gradcheck_reference_and_cpu_path():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = [torch.randn(2, 1, k, k, dtype=torch.float64, generator=generator, requires_grad=True) for k in (3, 5)]
    for op in (depthwise_multi_kernel, depthwise_multi_kernel_reference):
        assert gradcheck(lambda x, *weights, op=op: op(x, weights), (x, *weights))


def test_k3_float64_is_computed_in_float64():
    x, weights = random_arguments((1, 2, 4, 5), (3, 5), dtype=torch.float64)
    truth = depthwise_multi_kernel_reference(x, [weight.double() for weight in weights])
    torch.testing.assert_close(depthwise_multi_kernel(x, weights), truth, rtol=1e-13, atol=1e-13)
    meta = depthwise_multi_kernel(x.to("meta"), [weight.to("meta") for weight in weights])
    assert (meta.shape, meta.dtype) == (x.shape, torch.float64)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        depthwise_multi_kernel(x, weights)


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(bad):
    x, weights = random_arguments((1, 2, 2, 3), (3, 3), x_grad=False, weights_grad=False)
    with pytest.raises(TypeError, match=r"depthwise_multi_kernel: x is torch\..*expected one of float32"):
        depthwise_multi_kernel(x.to(bad), weights)
    with pytest.raises(TypeError, match=r"depthwise_multi_kernel: weights\[1\] is torch\."):
        depthwise_multi_kernel(x, [weights[0], weights[1].to(bad)])


def test_k1_refuses_what_is_no_tensor():
    x, (weight,) = random_arguments((1, 2, 2, 3), (3,), x_grad=False, weights_grad=False)
    with pytest.raises(TypeError, match=r"x is a numpy\.ndarray; expected a torch\.Tensor"):
        depthwise_multi_kernel(x.numpy(), [weight])
    with pytest.raises(TypeError, match=r"weights\[1\] is a numpy\.ndarray; expected a torch\.Tensor"):
        depthwise_multi_kernel(x, [weight, weight.numpy()])


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        ((2, 3, 4), [(3, 1, 3, 3)], r"x has shape \(2, 3, 4\); expected a map \(B, C, H, W\)"),
        ((1, 3, 4, 4), [], "weights is empty"),
        ((1, 3, 4, 4), [(3, 1, 4, 4)], r"weights\[0\] has shape \(3, 1, 4, 4\); expected \(3, 1, k, k\) with k odd"),
        ((1, 3, 4, 4), [(3, 1, 3, 3), (3, 1, 3, 5)], r"weights\[1\] has shape \(3, 1, 3, 5\)"),
        ((1, 3, 4, 4), [(2, 1, 3, 3)], "one kernel for each of the 3 channels of x"),
        ((1, 3, 4, 4), [(3, 3, 3, 3)], r"expected \(3, 1, k, k\)"),
        ((1, 3, 4, 4), [(3, 3)], r"expected \(3, 1, k, k\)"),
        ((1, 3, 4, 4), [()], r"weights\[0\] has shape \(\)"),
    ],
)
def test_k5_refuses_what_does_not_fit(x, weights, message):
    with pytest.raises(ShapeError, match=message):
        depthwise_multi_kernel(torch.zeros(x), [torch.zeros(weight) for weight in weights])


def test_k5_refuses_arguments_on_several_devices():
    with pytest.raises(ShapeError, match=r"x on cpu, weights\[0\] on meta"):
        depthwise_multi_kernel(torch.zeros(1, 3, 4, 4), [torch.zeros(3, 1, 3, 3, device="meta")])


@pytest.mark.parametrize("name", BACKENDS)
def test_arguments_are_left_alone(name):
    x, weights = random_arguments((1, 2, 3, 4), (1, 3))
    before = copy.deepcopy([t.detach() for t in (x, *weights)])
    with backend(name):
        depthwise_multi_kernel(x, weights).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *weights), strict=True))
