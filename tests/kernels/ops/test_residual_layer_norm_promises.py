"""Residual sum and layer norm: what it keeps and refuses, and compilers, transforms and autocast around it."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from trifuse.kernels import (
    BackendError,
    ShapeError,
    backend,
    residual_layer_norm,
    residual_layer_norm_reference,
)
from trifuse.kernels.testing import launches

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
every_backend = pytest.mark.parametrize("name", BACKENDS)
SHAPE = (2, 3, 8)


def random_arguments(shape=SHAPE, dtype=torch.float32, grad=True, seed=0):
    """The residual, the branch, weight, bias and layer scale."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, generator=generator) for size in (shape, shape, *[shape[-1:]] * 3)]
    return [value.to(dtype if value.ndim > 1 else torch.float32).requires_grad_(grad) for value in drawn]


def both(x, branch, weight, bias, scale, form=residual_layer_norm):
    """Both results as one tensor."""
    return torch.stack(form(x, branch, weight, bias, layer_scale=scale))


def reference(*tensors):
    return both(*tensors, form=residual_layer_norm_reference)


def test_k3_float64_is_computed_in_float64():
    given = [value.detach().double() for value in random_arguments()]
    torch.testing.assert_close(both(*given), reference(*given), rtol=1e-14, atol=1e-14)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        both(*given)


def test_k5_refuses_what_does_not_fit():
    x, branch, weight, bias, scale = random_arguments()
    with pytest.raises(ShapeError, match=r"x has shape \(8,\); expected \(B, \.\.\., C\)"):
        residual_layer_norm(weight)
    for given, message in (
        ({"branch": branch[:1]}, r"branch has shape \(1, 3, 8\); expected \(B, ..., C\) = \(2, 3, 8\) for x of shape"),
        ({"bias": bias[:2]}, r"bias has shape \(2,\); expected \(C,\) = \(8,\) for x of shape \(2, 3, 8\)"),
        ({"branch": branch, "sample_scale": scale}, r"sample_scale has shape \(8,\); expected \(B,\) = \(2,\)"),
        ({"weight": weight.to("meta")}, "x on cpu, weight on meta"),
    ):
        with pytest.raises(ShapeError, match=message):
            residual_layer_norm(x, **given)
    with pytest.raises(ValueError, match="expected eps of at least 0, got -1"):
        residual_layer_norm(x, eps=-1)
    for factor in ({"layer_scale": scale}, {"sample_scale": scale[:2].detach()}):
        with pytest.raises(ValueError, match="factors of a branch, which is None"):
            residual_layer_norm(x, **factor)
    with pytest.raises(ValueError, match=r"sample_scale requires a gradient, and has none; pass sample_scale\.detach"):
        residual_layer_norm(x, branch, sample_scale=scale[:2])


@interpreted
def test_tokens_wider_than_a_program_holds_are_refused(monkeypatch):
    monkeypatch.setattr(import_module("trifuse.kernels.gpu.residual_layer_norm"), "MOST_CHANNELS", 4)
    with backend("triton"), pytest.raises(BackendError, match=r"residual_layer_norm: tokens of 8 channels are wider"):
        both(*random_arguments())


@every_backend
def test_k7_fake_and_meta_tensors_give_shapes_without_data(name):
    given = [torch.empty(2**12, 2**12, 2**8, device="meta", dtype=torch.bfloat16) for _ in range(2)]
    given += [torch.empty(2**8, device="meta") for _ in range(3)]
    results = residual_layer_norm(*given[:4], layer_scale=given[4])
    assert [(result.shape, result.dtype) for result in results] == [(given[0].shape, torch.bfloat16)] * 2
    for value in given:
        value.requires_grad_()
    both(*given).sum().backward()
    assert [value.grad.dtype for value in given] == [value.dtype for value in given]
    with FakeTensorMode(), backend(name):
        given = random_arguments()
        both(*given).sum().backward()
        assert [value.grad.shape for value in given] == [value.shape for value in given]


@every_backend
def test_k19_nan_stays_in_its_token(name):
    x, *others = random_arguments(grad=False)
    x[1, 2, 3] = float("nan")
    with backend(name):
        total, normalised = residual_layer_norm(x, *others[:3])
    assert total.isnan().sum() == 1
    assert normalised.isnan()[1, 2].all()
    assert normalised.isnan().sum() == 8


@interpreted
def test_k23_second_differentiation_is_refused_by_the_kernels():
    given = random_arguments()
    with backend("triton"):
        (first,) = torch.autograd.grad(both(*given).square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_k23_second_differentiation_is_right_in_plain_pytorch():
    given = [value.detach().double().requires_grad_() for value in random_arguments((1, 2, 3))]
    assert torch.autograd.gradgradcheck(both, given)


@interpreted
@pytest.mark.parametrize("trained", [False, True])
def test_k24_saves_the_sum_and_two_numbers_per_token(trained):
    """And the branch where its factors are trained; never what is normalised."""
    x, branch, weight, bias, scale = random_arguments(dtype=torch.bfloat16)
    scale.requires_grad_(trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), backend("triton"):
        with torch.no_grad():
            both(x, branch, weight, bias, scale)
        with torch.inference_mode():
            both(x, branch, weight, bias, scale)
        assert saved == []
        total, _ = residual_layer_norm(x, branch, weight, bias, layer_scale=scale)
    maps = {t.data_ptr() for t in saved if t.shape == x.shape}
    assert maps == {total.data_ptr(), *([branch.data_ptr()] if trained else [])}
    assert sorted(t.numel() for t in saved if t.shape != x.shape) == [6, 6, 8, 8, 8]


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k25_under_autocast_the_sum_keeps_its_type_and_is_normalised_in_autocast_s(name, dtype):
    given = random_arguments(dtype=dtype)
    with backend(name):
        expected = residual_layer_norm(*given[:4], layer_scale=given[4])
        with torch.autocast("cpu", torch.bfloat16):
            total, normalised = residual_layer_norm(*given[:4], layer_scale=given[4])
        assert torch.equal(total, expected[0])
        assert torch.equal(normalised, expected[1].bfloat16())
        normalised.sum().backward()
        assert [value.grad.dtype for value in given] == [value.dtype for value in given]
        with torch.autocast("cpu", torch.bfloat16), backend("reference"):
            assert residual_layer_norm(given[0].double())[1].dtype == torch.float64


@every_backend
def test_k26_vmap_functional_and_forward_mode_differentiation(name):
    x, branch, weight, bias, scale = random_arguments(grad=False)
    weights = torch.stack([weight, -weight])
    with backend(name):
        mapped = torch.vmap(lambda w: both(x, branch, w, bias, scale))(weights)
        _, pushed = torch.func.jvp(lambda b: both(x, branch, weight, b, scale), (bias,), (torch.ones_like(bias),))
        pulled = torch.func.grad(lambda s: both(x, branch, weight, bias, s).square().sum())(scale)
    torch.testing.assert_close(mapped, torch.stack([reference(x, branch, w, bias, scale) for w in weights]))
    torch.testing.assert_close(pushed, torch.stack([torch.zeros_like(x), torch.ones_like(x)]))
    scale.requires_grad_()
    expected = torch.autograd.grad(reference(x, branch, weight, bias, scale).square().sum(), scale)[0]
    torch.testing.assert_close(pulled, expected)


@every_backend
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name):
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 6, 9):
            given = random_arguments((2, tokens, 8))
            got = torch.autograd.grad(compiled(*given).square().sum(), given)
            torch.testing.assert_close(got, torch.autograd.grad(reference(*given).square().sum(), given))


@every_backend
def test_compiles_under_autocast(name):
    torch._dynamo.reset()
    given = random_arguments(grad=False)
    compiled = torch.compile(residual_layer_norm, fullgraph=True, backend="aot_eager")
    with backend(name), torch.autocast("cpu", torch.bfloat16):
        assert [result.dtype for result in compiled(*given[:4])] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(mode):
    given = [random_arguments(grad=False, seed=seed) for seed in (0, 1)]
    graph = make_fx(lambda *tensors: both(*tensors), tracing_mode=mode)(*given[0])
    torch.testing.assert_close(graph(*given[1]), reference(*given[1]))


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(bad):
    x, branch, weight, bias, scale = random_arguments(grad=False)
    with pytest.raises(TypeError, match=r"residual_layer_norm: branch is torch\..*expected one of float32"):
        residual_layer_norm(x, branch.to(bad))
    with pytest.raises(TypeError, match=r"residual_layer_norm: layer_scale is torch\..*expected one of float32"):
        residual_layer_norm(x, branch, weight, bias, layer_scale=scale.to(bad))
    with pytest.raises(TypeError, match=r"x is a numpy\.ndarray; expected a torch\.Tensor"):
        residual_layer_norm(x.numpy())


def test_on_a_cpu_it_is_pytorch_s_own_layer_norm():
    """To the last bit, without a launch: what the networks computed before."""
    x, branch, weight, bias, scale = random_arguments(grad=False)
    with launches() as counted:
        total, normalised = residual_layer_norm(x, branch, weight, bias, layer_scale=scale, eps=1e-6)
    assert torch.equal(total, torch.addcmul(x, branch, scale))
    assert torch.equal(normalised, F.layer_norm(total, (8,), weight, bias, 1e-6))
    assert not counted.kernels
