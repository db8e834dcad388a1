"""The tools that judge operators are judged themselves: each wrong operator below must be caught, and named."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trifuse.kernels import testing
from trifuse.kernels.testing import Timing, assert_op_matches, measure, peak_memory_bytes, poisoned_empty, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 5))
MIB = 1 << 20


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


def test_tensors_draw_every_layout():
    seen = set()

    @settings(max_examples=200, derandomize=True)
    @given(tensors((3, 4), dtypes=DTYPES, expanded=True))
    def draw(x):
        assert x.shape == (3, 4)
        assert x.is_leaf
        seen.update(
            {
                "offset": x.storage_offset() > 0,
                "permuted": x.stride(0) < x.stride(1),
                "stepped": x.stride(1) == 2,
                "expanded": 0 in x.stride(),
                "contiguous": x.is_contiguous(),
                "needs gradient": x.requires_grad,
            }.items()
        )
        seen.add(x.dtype)

    draw()
    assert len(seen) == 12 + len(DTYPES)


@given(tensors((2, 3), dtypes=(torch.int64, torch.bool)))
def test_integers_are_drawn_without_gradients(x):
    assert not x.requires_grad


def test_plain_tensors_are_contiguous():
    @given(tensors((2, 3), strided=False, requires_grad=True))
    def check(x):
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        assert x.requires_grad

    check()


def test_poison_reaches_every_way_to_allocate():
    x = torch.ones(3)
    plain = torch.empty
    with poisoned_empty():
        fresh = [torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,))]
        assert all(tensor.isnan().all() for tensor in fresh)
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    assert torch.empty is plain


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: torch.empty(MIB, dtype=torch.int8), MIB),
        (lambda: [torch.zeros(MIB, dtype=torch.int8) for _ in range(3)], 3 * MIB),
        (lambda: [torch.zeros(MIB // 4).sum() for _ in range(3)], MIB),
        (lambda: (torch.ones(MIB, dtype=torch.int8) + 1) * 2, 2 * MIB),
        (lambda: None, 0),
    ],
    ids=["one", "three held", "three in turn", "chain", "nothing"],
)
def test_peak_memory_of_known_cases(function, expected):
    assert expected <= peak_memory_bytes(function) < expected + 4096


def test_peak_memory_sees_what_is_saved_for_backward():
    x = torch.zeros(MIB // 4, requires_grad=True)

    def step():
        y = x
        for _ in range(10):
            y = y.exp()
        return torch.autograd.grad(y.sum(), x)

    assert 10 * MIB <= peak_memory_bytes(step) < 12 * MIB + 4096


def test_measure_tells_fast_from_slow():
    x = torch.ones(64, 64)

    def once():
        return x @ x

    def four_times():
        return [x @ x for _ in range(4)]

    timings = measure({"slow": four_times, "fast": once}, seconds=0.2)
    assert 2 < timings["fast"].speedup_over(timings["slow"]) < 8
    low, high = timings["slow"].quintiles
    assert 0 < low <= timings["slow"].median <= high
    assert timings["slow"].peak_bytes == 4 * timings["fast"].peak_bytes == 4 * 64 * 64 * 4


def test_speedup_is_paired():
    """A machine that turns ten times slower halfway leaves the ratio of each round as it was."""
    fast, slow = Timing((1.0, 1.0, 10.0, 10.0), 0), Timing((2.0, 2.0, 20.0, 20.0), 0)
    assert fast.speedup_over(slow) == 2.0


def test_gpu_benchmark_runs_everywhere(gpu_benchmark):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(1 << 16, device=device)
    timings = gpu_benchmark({"add": lambda: x + x}, seconds=0.05)
    assert timings["add"].median > 0
    assert timings["add"].peak_bytes >= x.nbytes


def test_names_that_need_torch_come_when_they_are_used():
    assert {name for name in testing.__all__ if getattr(testing, name) is None} == set()
    assert testing.compare.__module__ == "trifuse.kernels.testing.comparing"
    with pytest.raises(AttributeError, match="no attribute 'comparison'"):
        _ = testing.comparison


def test_plugin_is_light():
    """pytest loads the plugin in every project that has trifuse installed: it must not bring heavy packages along."""
    code = (
        "import sys, trifuse.kernels.testing;"
        "sys.exit(' '.join({'torch', 'hypothesis', 'triton', 'numpy'} & set(sys.modules)) or 0)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
