"""The comparison of an operator with its reference: each wrong operator below must be caught, and named."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trifuse.kernels.testing import assert_op_matches, poisoned_empty, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 5))


def scaled_reference(x, scale):
    return x * scale.to(x.dtype).reshape(-1, 1, 1)


class _Scaled(torch.autograd.Function):
    """A sound operator with one place to break in each pass."""

    @staticmethod
    def forward(ctx, x, scale, fault):
        ctx.save_for_backward(x, scale)
        ctx.fault = fault
        values = x.contiguous()
        if fault == "reads by the strides of a contiguous tensor":
            values = torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset())
        out = (values.double() * scale.double().reshape(-1, 1, 1)).to(x.dtype)
        if fault == "wrong value":
            out = out + 0.01
        if fault == "wrong last element":
            out[-1, -1, -1] += 0.1
        if fault == "element not written":
            out[0, 0, 0] = torch.empty((), dtype=out.dtype)
        if fault == "wrong dtype":
            out = out.double()
        if fault == "wrong shape":
            out = out[..., None]
        if fault == "low precision inside":
            out = (values.bfloat16() * scale.bfloat16().reshape(-1, 1, 1)).to(x.dtype)
        if fault == "writes into its argument":
            x.add_(1.0)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        if ctx.fault == "reads the gradient by contiguous strides" and 0 in grad.stride():
            grad = grad.clone() * 0.5
        grad_x = grad * scale.to(x.dtype).reshape(-1, 1, 1)
        grad_scale = (grad.double() * x.double()).sum((1, 2)).to(scale.dtype)
        if ctx.fault == "wrong gradient of scale":
            grad_scale = grad_scale * 1.01
        if ctx.fault == "gradient of x missing":
            grad_x = None
        return grad_x, grad_scale, None


def scaled(fault=None):
    def op(x, scale):
        return _Scaled.apply(x, scale, fault)

    return op


def arguments(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, 3, generator=generator).to(dtype).permute(1, 2, 0).requires_grad_()
    return x, torch.randn(4, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sound_operator_passes(dtype):
    assert_op_matches(scaled(), scaled_reference, *arguments(dtype))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong value", "output: expected"),
        ("wrong last element", r"output: expected .* at \(3, 2, 4\)"),
        ("element not written", r"output: expected .* at \(0, 0, 0\), got nan"),
        ("wrong dtype", "output: expected dtype torch.float32, got torch.float64"),
        ("wrong shape", r"output: expected shape .*\(\[4, 3, 5\]\), got .*\(\[4, 3, 5, 1\]\)"),
        ("low precision inside", "more than twice eager PyTorch's largest"),
        ("writes into its argument", "wrote into x"),
        ("reads by the strides of a contiguous tensor", "output: expected"),
        ("reads the gradient by contiguous strides", "gradient of x, incoming gradient of stride zero"),
        ("wrong gradient of scale", "gradient of scale, incoming gradient random"),
        ("gradient of x missing", "gradient of x, .*: expected a gradient, got no gradient"),
    ],
)
def test_wrong_operator_is_caught(fault, message):
    with poisoned_empty(), pytest.raises(AssertionError, match=message):
        assert_op_matches(scaled(fault), scaled_reference, *arguments())


def test_gradients_in_nested_arguments_are_named():
    def wrong_second(features, scale):
        return features[0] + features[1].detach() * 0 + features[1] * scale * 1.1

    def reference(features, scale):
        return features[0] + features[1] * scale

    features = [torch.ones(2, requires_grad=True) for _ in range(2)]
    with pytest.raises(AssertionError, match="output"):
        assert_op_matches(wrong_second, reference, features, scale=torch.ones(()))

    def wrong_gradient(features, scale):
        return features[0] + features[1].detach() * scale

    with pytest.raises(AssertionError, match=r"gradient of features\[1\]"):
        assert_op_matches(wrong_gradient, reference, features, scale=torch.ones(()))


def test_builtins_name_their_arguments_by_place():
    x = torch.randn(2, 3, requires_grad=True)
    assert_op_matches(torch.add, torch.add, x, x.detach())
    with pytest.raises(AssertionError, match=r"add: gradient of args\[1\]"):
        assert_op_matches(torch.add, lambda a, b: a + 2 * b - b.detach(), x, x.detach().requires_grad_())


def test_named_tuples_are_arguments_as_they_are():
    pair = namedtuple("Pair", "scale shift")(torch.ones(3, requires_grad=True), torch.zeros(3))
    assert_op_matches(lambda x, p: x * p.scale + p.shift, lambda x, p: p.shift + p.scale * x, torch.randn(2, 3), pair)


@pytest.mark.parametrize("result", [None, 1.0, {"y": torch.zeros(2)}, (torch.zeros(2), None)], ids=str)
def test_results_that_are_no_tensors_are_refused(result):
    with pytest.raises(
        TypeError, match=r"expected a tensor, or a list or tuple of tensors, got a (NoneType|float|dict)"
    ):
        assert_op_matches(lambda x: result, lambda x: result, torch.zeros(2))


def test_infinities_must_lie_where_the_reference_has_them():
    x = torch.tensor([1.0, torch.inf, torch.nan])
    assert_op_matches(lambda x: x * 1, lambda x: x + 0, x)
    with pytest.raises(AssertionError, match="infinities and NaN"):
        assert_op_matches(lambda x: x.nan_to_num(), lambda x: x + 0, x)


def test_integer_results_must_be_equal():
    x = torch.tensor([[0.2, 0.1], [0.3, 0.4]])
    assert_op_matches(lambda x: x.argmax(0), lambda x: x.argmax(0), x)
    with pytest.raises(AssertionError, match="2 of 2 values differ"):
        assert_op_matches(lambda x: x.argmin(0), lambda x: x.argmax(0), x)


@given(tensors(SHAPES, dtypes=DTYPES, expanded=True))
def test_any_drawn_tensor_passes_a_sound_operator(x):
    scale = torch.ones(x.shape[0], dtype=x.dtype, requires_grad=x.requires_grad)
    assert_op_matches(scaled(), scaled_reference, x, scale)
