"""The depthwise multi-kernel convolution under PyTorch's compilers, tracers and transforms, and what it saves."""

from __future__ import annotations

import pytest
import torch
from depthwise_arguments import BACKENDS, interpreted, random_arguments
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import backend, depthwise_multi_kernel, depthwise_multi_kernel_reference

pytestmark = pytest.mark.usefixtures("low_tiles")


@pytest.mark.slow  # one form of each operator: test_registered_operators.py
@interpreted
def test_opcheck():
    x, weights = random_arguments((1, 2, 3, 4), (1, 3))
    ops = torch.ops.trifuse
    torch.library.opcheck(ops.depthwise_multi_kernel.default, (x, weights, True))
    x, weights = x.detach().contiguous(memory_format=torch.channels_last), [weight.detach() for weight in weights]
    torch.library.opcheck(ops.depthwise_multi_kernel.default, (x, weights, False))
    torch.library.opcheck(ops.depthwise_multi_kernel_input_gradient.default, (x, torch.randn(9, 2)))
    torch.library.opcheck(ops.depthwise_multi_kernel_weight_gradients.default, (x, x + 1, weights, [False, True]))


@pytest.mark.parametrize("name", BACKENDS)
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name):
    compiled = torch.compile(depthwise_multi_kernel, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for height in (5, 6, 9):
            x, weights = random_arguments((2, 3, height, 4), (1, 3))
            out = compiled(x, weights)
            out.square().sum().backward()
            got = [out, x.grad, *(weight.grad for weight in weights)]
            x, weights = random_arguments((2, 3, height, 4), (1, 3))
            out = depthwise_multi_kernel_reference(x, weights)
            out.square().sum().backward()
            expected = [out, x.grad, *(weight.grad for weight in weights)]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_k7_fake_and_meta_tensors_give_shapes_without_data():
    x = torch.empty(2**10, 2**8, 2**10, 2**10, device="meta", dtype=torch.bfloat16)
    out = depthwise_multi_kernel(x, [torch.empty(2**8, 1, 7, 7, device="meta")])
    assert (out.shape, out.dtype, out.device.type) == (x.shape, torch.bfloat16, "meta")
    with FakeTensorMode():
        x, weights = torch.empty(2, 5, 4, 3, requires_grad=True), [torch.empty(5, 1, 3, 3, requires_grad=True)]
        out = depthwise_multi_kernel(x, weights)
        out.sum().backward()
        assert [out.shape, x.grad.shape, weights[0].grad.shape] == [(2, 5, 4, 3), (2, 5, 4, 3), (5, 1, 3, 3)]


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(mode):
    def convolve(x, first, second):
        return depthwise_multi_kernel(x, [first, second])

    x, weights = random_arguments((2, 3, 5, 4), (1, 3), x_grad=False, weights_grad=False)
    graph = make_fx(convolve, tracing_mode=mode)(x, *weights)
    x, weights = random_arguments((2, 3, 5, 4), (1, 3), x_grad=False, weights_grad=False, seed=1)
    expected = depthwise_multi_kernel_reference(x, weights)
    torch.testing.assert_close(graph(x, *weights), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_k26_vmap_functional_and_forward_mode_differentiation(name):
    x, weights = random_arguments((2, 3, 4, 5), (1, 3), x_grad=False, weights_grad=False)
    many = torch.stack([x, 2 * x, -x])
    with backend(name):
        mapped = torch.vmap(lambda x: depthwise_multi_kernel(x, weights))(many)
        _, pushed = torch.func.jvp(lambda x: depthwise_multi_kernel(x, weights), (x,), (x,))
        pulled = torch.func.grad(lambda w: depthwise_multi_kernel(x, [w]).square().sum())(weights[1])
    expected = torch.stack([depthwise_multi_kernel_reference(each, weights) for each in many])
    torch.testing.assert_close(mapped, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pushed, expected[0], atol=1e-5, rtol=1e-5)
    weight = weights[1].requires_grad_()
    depthwise_multi_kernel_reference(x, [weight]).square().sum().backward()
    torch.testing.assert_close(pulled, weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_k23_second_differentiation_is_refused(name):
    x, weights = random_arguments((1, 2, 2, 3), (3,))
    with backend(name):
        (first,) = torch.autograd.grad(depthwise_multi_kernel(x, weights).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_k24_saves_the_arguments_and_at_most_the_merged_kernel(name):
    x, weights = random_arguments((1, 2, 4, 5), (1, 3))
    saved = []

    def save(tensor):
        if tensor.shape != (9, 2):  # the merged kernel's nine taps of two channels
            saved.append(tensor.data_ptr())

    with torch.autograd.graph.saved_tensors_hooks(save, lambda _: None), backend(name):
        with torch.no_grad():
            depthwise_multi_kernel(x, weights)
        with torch.inference_mode():
            depthwise_multi_kernel(x, weights)
        assert saved == []
        depthwise_multi_kernel(x, weights)
        assert sorted(saved) == sorted(t.data_ptr() for t in (x, *weights))
        saved.clear()
        depthwise_multi_kernel(x, [weight.detach() for weight in weights])
        assert sorted(saved) == sorted(weight.data_ptr() for weight in weights)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k25_autocast_changes_nothing(name):
    def run():
        x, weights = random_arguments((1, 2, 4, 5), (1, 3))
        out = depthwise_multi_kernel(x, weights)
        return out, *torch.autograd.grad(out.sum(), [x, *weights])

    with backend(name):
        plain = run()
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))
