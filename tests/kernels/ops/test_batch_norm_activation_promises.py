"""Batch norm with activation: what it keeps and refuses, and compilers, transforms and autocast around it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import (
    BackendError,
    ShapeError,
    backend,
    batch_norm_activation,
    batch_norm_activation_reference,
)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
every_backend = pytest.mark.parametrize("name", BACKENDS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
SHAPE = (2, 3, 4, 5)


def random_arguments(shape=SHAPE, dtype=torch.float32, grad=True, seed=0):
    """Maps, running statistics, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, mean = (torch.randn(size, generator=generator) for size in (shape, *[shape[1:2]] * 3))
    x, weight, bias = (value.requires_grad_(grad) for value in (x.to(dtype), weight, bias))
    return [x, mean, 0.5 + torch.rand(shape[1], generator=generator), weight, bias]


@every_backend
@in_both_modes
def test_k2_output_keeps_the_map_s_type_and_gradients_the_arguments_own(name, training):
    x, mean, variance, weight, bias = random_arguments()
    with backend(name):
        out = batch_norm_activation(x.half(), mean, variance.half(), weight, bias.bfloat16(), training=training)
        grads = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert out.dtype == torch.float16
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


@in_both_modes
def test_k3_float64_is_computed_in_float64(training):
    arguments = [value.detach().double() for value in random_arguments()]
    truth = batch_norm_activation_reference(*(value.clone() for value in arguments), training=training)
    got = batch_norm_activation(*(value.clone() for value in arguments), training=training)
    torch.testing.assert_close(got, truth, rtol=1e-14, atol=1e-14)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        batch_norm_activation(*arguments)


def test_k5_refuses_what_does_not_fit():
    x, mean, variance, weight, bias = random_arguments()
    with pytest.raises(ShapeError, match=r"x has shape \(3, 4, 5\); expected \(B, C, H, W\)"):
        batch_norm_activation(x[0])
    with pytest.raises(ShapeError, match=r"x has shape \(1, 2, 3, 4, 5\); .*fold .* x\.flatten\(2, 3\)$"):
        batch_norm_activation(x[None])
    with pytest.raises(
        ShapeError, match=r"running_var has shape \(2,\); expected \(C,\) = \(3,\) for x of shape \(2, 3, 4, 5"
    ):
        batch_norm_activation(x, mean, variance[:2])
    for running in ((mean, None), (None, variance)):
        with pytest.raises(ShapeError, match="expected running_mean and running_var, or neither"):
            batch_norm_activation(x, *running)
    with pytest.raises(ShapeError, match="x on cpu, running_mean on meta"):
        batch_norm_activation(x, mean.to("meta"), variance, weight, bias)
    with pytest.raises(ValueError, match="expected eps of at least 0"):
        batch_norm_activation(x, eps=-1e-5)
    with pytest.raises(ValueError, match="activation: expected one of 'relu', 'gelu', got 'silu'"):
        batch_norm_activation(x, activation="silu")


@every_backend
@in_both_modes
def test_k7_fake_and_meta_tensors_give_shapes_without_data(name, training):
    x = torch.empty((2**8,) * 4, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    small = [torch.zeros(2**8, device="meta") for _ in range(4)]
    out = batch_norm_activation(x.requires_grad_(), *small, training=training)
    out.sum().backward()
    assert (out.shape, out.dtype, out.stride(), x.grad.stride()) == (x.shape, x.dtype, x.stride(), x.stride())
    with FakeTensorMode(), backend(name):
        x, mean, variance, *affine = random_arguments()
        batch_norm_activation(x, mean, variance, *affine, training=training).sum().backward()
        assert [value.grad.shape for value in (x, *affine)] == [value.shape for value in (x, *affine)]


@every_backend
@in_both_modes
def test_k19_nan_stays_in_its_channel_and_in_evaluation_in_its_place(name, training):
    arguments = random_arguments(grad=False)
    arguments[0][1, 2, 3, 4] = float("nan")
    with backend(name):
        spoiled = batch_norm_activation(*arguments, training=training).isnan()
    assert spoiled[:, 2].all() if training else spoiled[1, 2, 3, 4]
    assert spoiled.sum() == (40 if training else 1)


@every_backend
def test_k19_an_infinity_is_rectified_in_evaluation(name):
    x = torch.tensor([float("-inf"), -0.5, 0.0, float("inf")]).view(1, 1, 1, 4)
    with backend(name):
        out = batch_norm_activation(x, torch.zeros(1), torch.ones(1), eps=0.0)
    assert out.flatten().tolist() == [0.0, 0.0, 0.0, float("inf")]


@interpreted
@in_both_modes
def test_k23_second_differentiation_is_refused_by_the_kernels(training):
    x, *small = random_arguments()
    with backend("triton"):
        out = batch_norm_activation(x, *small, training=training)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@in_both_modes
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_k23_a_second_differentiation_is_right_in_plain_pytorch(training, activation):
    x, mean, variance, *affine = (value.detach().double() for value in random_arguments())
    arguments = [value.requires_grad_() for value in (x, *affine)]

    def run(x, weight, bias):
        running = mean.clone(), variance.clone()
        return batch_norm_activation(x, *running, weight, bias, training=training, activation=activation)

    assert gradgradcheck(run, arguments)


@every_backend
@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k24_saves_the_map_and_two_numbers_per_channel(name, dtype, training):
    """In plain PyTorch, the rectified map as well, which the next layer keeps anyway; never one of another type."""
    x, *small = random_arguments(dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), backend(name):
        with torch.no_grad():
            batch_norm_activation(x, *small, training=training)
        with torch.inference_mode():
            batch_norm_activation(x, *small, training=training)
        assert saved == []
        out = batch_norm_activation(x, *small, training=training)
    maps = {t.data_ptr() for t in saved if t.shape == x.shape}
    assert maps == ({x.data_ptr()} if name == "triton" else {x.data_ptr(), out.data_ptr()})
    if name == "triton":
        assert [t.numel() for t in saved if t.shape != x.shape] == [3, 3, 3, 3]


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k25_autocast_changes_nothing(name, dtype, training):
    arguments = random_arguments(dtype=dtype)
    with backend(name):
        plain = batch_norm_activation(*(value.clone() for value in arguments), training=training)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(batch_norm_activation(*arguments, training=training), plain)


@every_backend
def test_k26_vmap_functional_and_forward_mode_differentiation(name):
    x, mean, variance, weight, bias = random_arguments(grad=False)
    weights, reference = torch.stack([weight, -weight]), batch_norm_activation_reference
    for running in ((mean, variance), (None, None)):

        def run(weight, bias, form=batch_norm_activation, running=running):
            return form(x, *running, weight, bias)

        with backend(name):
            mapped = torch.vmap(lambda w, run=run: run(w, bias))(weights)
            _, pushed = torch.func.jvp(lambda b, run=run: run(weight, b), (bias,), (torch.ones_like(bias),))
            pulled = torch.func.grad(lambda w, run=run: run(w, bias).square().sum())(weight)
        torch.testing.assert_close(mapped, torch.stack([run(w, bias, reference) for w in weights]))
        torch.testing.assert_close(pushed, (run(weight, bias, reference) > 0).float())
        learned = weight.clone().requires_grad_()
        expected = torch.autograd.grad(run(learned, bias, reference).square().sum(), learned)[0]
        torch.testing.assert_close(pulled, expected)


@every_backend
@in_both_modes
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name, training):
    """The running statistics are brought up to date by the graph as well."""
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm_activation, fullgraph=True, backend="aot_eager", dynamic=True)
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for width in (5, 6, 9):
            found = []
            for form in (compiled, batch_norm_activation_reference):
                x, mean, variance, *affine = random_arguments((2, 3, 4, width))
                out = form(x, mean, variance, *affine, training=training)
                found.append((mean, variance, *torch.autograd.grad(out.square().sum(), (x, *affine))))
            torch.testing.assert_close(*found)


@in_both_modes
@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(mode, training):
    first, second = (random_arguments(grad=False, seed=seed) for seed in (0, 1))
    graph = make_fx(lambda *given: batch_norm_activation(*given, training=training), tracing_mode=mode)(*first)
    expected = batch_norm_activation_reference(*(value.clone() for value in second), training=training)
    torch.testing.assert_close(graph(*second), expected)


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(bad):
    x, mean, variance, weight, bias = random_arguments(grad=False)
    with pytest.raises(TypeError, match=r"batch_norm_activation: x is torch\..*expected one of float32"):
        batch_norm_activation(x.to(bad))
    with pytest.raises(TypeError, match=r"batch_norm_activation: running_mean is torch\..*expected one of float32"):
        batch_norm_activation(x, mean.to(bad), variance, weight, bias)
    with pytest.raises(TypeError, match=r"x is a numpy\.ndarray; expected a torch\.Tensor"):
        batch_norm_activation(x.numpy())


def laid_out(shape, order, batch_stride, seed):
    """Numbers whose dimensions lie in memory in an order of their own, outermost first."""
    values = torch.randn([shape[i] for i in order], generator=torch.Generator().manual_seed(seed))
    values = values.permute([order.index(i) for i in range(4)])
    return values if shape[0] > 1 else values.as_strided(shape, (batch_stride, *values.stride()[1:]))


@every_backend
@in_both_modes
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 5), (3, 2, 1, 2), (2, 2, 3, 1), (1, 2, 2, 3), (2, 1, 2, 3), (1, 5, 4, 1)])
def test_k8_k9_gradients_where_sides_of_one_leave_several_layouts(name, training, activation, shape):
    for batch_stride, (seed, order) in itertools.product((1, 7), enumerate(itertools.permutations(range(4)))):
        x, *rest = random_arguments(shape)
        x = laid_out(shape, order, batch_stride, seed).requires_grad_()
        incoming = laid_out(shape, order[::-1], 4, seed + 1)
        found = []
        for one in (name, "reference"):
            with backend(one):
                out = batch_norm_activation(x, *(v.clone() for v in rest), training=training, activation=activation)
            found.append(torch.autograd.grad(out, (x, *rest[2:]), incoming))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
