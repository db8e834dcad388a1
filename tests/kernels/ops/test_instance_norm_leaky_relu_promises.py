"""Instance norm with leaky rectifier: what it keeps and refuses, and compilers, transforms and autocast around it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import (
    BackendError,
    ShapeError,
    backend,
    instance_norm_leaky_relu,
    instance_norm_leaky_relu_reference,
)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
every_backend = pytest.mark.parametrize("name", BACKENDS)
SHAPE = (2, 3, 4, 5)


def random_arguments(shape=SHAPE, dtype=torch.float32, grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    affine = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return [value.requires_grad_(grad) for value in (x, *affine)]


@every_backend
def test_k2_output_keeps_the_map_s_type_and_gradients_the_arguments_own(name):
    x, weight, bias = random_arguments()
    with backend(name):
        out = instance_norm_leaky_relu(x.half(), weight, bias.bfloat16())
        grads = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert out.dtype == torch.float16
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


def test_k3_float64_is_computed_in_float64():
    arguments = [value.detach().double() for value in random_arguments()]
    truth = instance_norm_leaky_relu_reference(*arguments)
    torch.testing.assert_close(instance_norm_leaky_relu(*arguments), truth, rtol=1e-14, atol=1e-14)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        instance_norm_leaky_relu(*arguments)


def test_k5_refuses_what_does_not_fit():
    x, weight, bias = random_arguments()
    with pytest.raises(ShapeError, match=r"x has shape \(3, 4, 5\); expected \(B, C, H, W\)"):
        instance_norm_leaky_relu(x[0])
    with pytest.raises(ShapeError, match=r"x has shape \(1, 2, 3, 4, 5\); .*fold .* x\.flatten\(2, 3\)$"):
        instance_norm_leaky_relu(x[None])
    with pytest.raises(
        ShapeError, match=r"bias has shape \(2,\); expected \(C,\) = \(3,\) for x of shape \(2, 3, 4, 5"
    ):
        instance_norm_leaky_relu(x, weight, bias[:2])
    with pytest.raises(ShapeError, match="x on cpu, weight on meta"):
        instance_norm_leaky_relu(x, weight.to("meta"))
    for options in ({"eps": -1e-5}, {"negative_slope": -0.01}):
        with pytest.raises(ValueError, match="expected eps and negative_slope of at least 0"):
            instance_norm_leaky_relu(x, **options)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_a_single_position_is_refused_as_by_pytorch(name):
    x = torch.randn(2, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        torch.nn.functional.instance_norm(x)
    with backend(name), pytest.raises(ShapeError, match=r"more than one value per channel .* \(2, 3, 1, 1\)"):
        instance_norm_leaky_relu(x)


@every_backend
def test_k7_fake_and_meta_tensors_give_shapes_without_data(name):
    x = torch.empty((2**8,) * 4, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    out = instance_norm_leaky_relu(x.requires_grad_(), torch.zeros(2**8, device="meta"))
    out.sum().backward()
    assert (out.shape, out.dtype, out.stride(), x.grad.stride()) == (x.shape, x.dtype, x.stride(), x.stride())
    with FakeTensorMode(), backend(name):
        arguments = random_arguments()
        instance_norm_leaky_relu(*arguments).sum().backward()
        assert [value.grad.shape for value in arguments] == [value.shape for value in arguments]


@every_backend
def test_k19_nan_stays_in_its_plane(name):
    x, *affine = random_arguments(grad=False)
    x[1, 2, 3, 4] = float("nan")
    with backend(name):
        spoiled = instance_norm_leaky_relu(x, *affine).isnan()
    assert spoiled[1, 2].all()
    assert spoiled.sum() == 20


@every_backend
def test_k23_second_differentiation_is_refused(name):
    arguments = random_arguments()
    with backend(name):
        out = instance_norm_leaky_relu(*arguments)
        (first,) = torch.autograd.grad(out.square().sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k24_saves_the_map_and_two_numbers_per_plane(name, dtype):
    """In plain PyTorch, the result as well, which the next layer keeps anyway; never a map of another type."""
    x, weight, bias = random_arguments(dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), backend(name):
        with torch.no_grad():
            instance_norm_leaky_relu(x, weight, bias)
        with torch.inference_mode():
            instance_norm_leaky_relu(x, weight, bias)
        assert saved == []
        out = instance_norm_leaky_relu(x, weight, bias)
    maps = {t.data_ptr() for t in saved if t.shape == x.shape}
    assert maps == ({x.data_ptr()} if name == "triton" else {x.data_ptr(), out.data_ptr()})
    assert sorted(t.numel() for t in saved if t.shape != x.shape) == ([3, 3, 6, 6] if name == "triton" else [3, 6, 6])


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k25_autocast_changes_nothing(name, dtype):
    arguments = random_arguments(dtype=dtype)
    with backend(name):
        plain = instance_norm_leaky_relu(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(instance_norm_leaky_relu(*arguments), plain)


@every_backend
def test_k26_vmap_functional_and_forward_mode_differentiation(name):
    x, weight, bias = random_arguments(grad=False)
    weights, reference = torch.stack([weight, -weight]), instance_norm_leaky_relu_reference
    with backend(name):
        mapped = torch.vmap(lambda w: instance_norm_leaky_relu(x, w, bias))(weights)
        ones = torch.ones_like(bias)
        _, pushed = torch.func.jvp(lambda b: instance_norm_leaky_relu(x, weight, b), (bias,), (ones,))
        pulled = torch.func.grad(lambda w: instance_norm_leaky_relu(x, w, bias).square().sum())(weight)
    torch.testing.assert_close(mapped, torch.stack([reference(x, w, bias) for w in weights]))
    torch.testing.assert_close(pushed, torch.where(reference(x, weight, bias) > 0, 1.0, 0.01))
    weight.requires_grad_()
    torch.testing.assert_close(pulled, torch.autograd.grad(reference(x, weight, bias).square().sum(), weight)[0])


@every_backend
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name):
    torch._dynamo.reset()
    compiled = torch.compile(instance_norm_leaky_relu, fullgraph=True, backend="aot_eager", dynamic=True)
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for width in (5, 6, 9):
            arguments = random_arguments((2, 3, 4, width))
            got = torch.autograd.grad(compiled(*arguments).square().sum(), arguments)
            reference = instance_norm_leaky_relu_reference(*arguments)
            torch.testing.assert_close(got, torch.autograd.grad(reference.square().sum(), arguments))


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(mode):
    arguments = [random_arguments(grad=False, seed=seed) for seed in (0, 1)]
    graph = make_fx(lambda *given: instance_norm_leaky_relu(*given), tracing_mode=mode)(*arguments[0])
    torch.testing.assert_close(graph(*arguments[1]), instance_norm_leaky_relu_reference(*arguments[1]))


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(bad):
    x, weight, bias = random_arguments(grad=False)
    with pytest.raises(TypeError, match=r"instance_norm_leaky_relu: x is torch\..*expected one of float32"):
        instance_norm_leaky_relu(x.to(bad))
    with pytest.raises(TypeError, match=r"instance_norm_leaky_relu: bias is torch\..*expected one of float32"):
        instance_norm_leaky_relu(x, weight, bias.to(bad))
    with pytest.raises(TypeError, match=r"x is a numpy\.ndarray; expected a torch\.Tensor"):
        instance_norm_leaky_relu(x.numpy())
