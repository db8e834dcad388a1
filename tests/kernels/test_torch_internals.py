"""Every private name of torch that trifuse uses does what is relied on, in every supported version."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from ready_python import run_python
from torch import Tensor
from torch._dynamo import trace_rules
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import torch_internals
from trifuse.kernels.testing import poisoned_empty


@pytest.fixture
def doubling():
    """Return an operator whose gradient's registration calls the kernels below it, and what was called."""
    called = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            with torch_internals.below_autograd():
                return torch.ops.trifuse_internals_test.double(x)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return 2 * grad

    def on_a_cpu(x: Tensor) -> Tensor:
        called.append("CPU")
        return 2 * x

    library = torch.library.Library("trifuse_internals_test", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", on_a_cpu, "CPU")
    library.impl("double", lambda x: called.append("Autograd") or Double.apply(x), "Autograd")
    yield torch.ops.trifuse_internals_test.double, called
    library._destroy()


def test_below_autograd_reaches_the_kernel_and_gradients_stay(doubling):
    double, called = doubling
    x = torch.ones(3, requires_grad=True)
    double(x).sum().backward()
    assert called == ["Autograd", "CPU"]
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_kernel_for_the_cpu_is_called_alone(doubling):
    double, called = doubling
    x = torch.ones(3, requires_grad=True)
    assert torch_internals.call_cpu_kernel(double.default, x).tolist() == [2.0, 2.0, 2.0]
    assert called == ["CPU"]


class Seeing(torch_internals.TorchDispatchMode):
    """Write down the names of all operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_every_operator():
    arguments = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    with Seeing() as seen:
        torch.nn.functional.linear(*arguments)
    assert seen.names == ["t.default", "addmm.default"]
    with seen, torch_internals.outside_of_modes():
        torch.nn.functional.linear(*arguments)
    assert len(seen.names) == 2


def test_forward_mode_is_told():
    x = torch.ones(2)
    assert not torch_internals.under_functional_transform((x,))
    with forward_ad.dual_level():
        assert torch_internals.under_functional_transform((x,))
    assert not torch_internals.under_functional_transform((x,))


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_transforms_are_told_by_the_tensors_that_they_are_about(transform):
    found = []
    outside = torch.ones(2)

    def function(x: Tensor) -> Tensor:
        found.extend(torch_internals.under_functional_transform((y,)) for y in (outside, x))
        found.append(torch_internals.under_functional_transform((outside, x)))
        return x.sum()

    transform(function)(torch.ones(2))
    assert found == [False, True, True]


def test_recording_and_tensors_without_values_are_told():
    found = []

    def function(x: Tensor) -> Tensor:
        found.append(torch_internals.without_values((x,)))
        return x + 1

    function(torch.ones(2))
    make_fx(function)(torch.ones(2))
    with FakeTensorMode():
        x = torch.ones(2)
    function(x)
    with FakeTensorMode():
        found.append(torch_internals.without_values(()))
    function(torch.nn.Parameter(torch.ones(2)))
    assert found == [False, True, True, True, False]


def test_a_running_backward_pass_is_told():
    found = [torch_internals.inside_backward()]

    class Looking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            found.append(torch_internals.inside_backward())
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            found.append(torch_internals.inside_backward())
            return grad

    Looking.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert [*found, torch_internals.inside_backward()] == [False, False, True, False]


def test_every_allocation_and_release_is_told():
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        x = torch.ones(3000)
        del x
    changes = sorted(torch_internals.allocations(profile))
    assert [size for _, size in changes] == [12000, -12000]


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_hooks_of_a_module_are_told(register):
    module = torch.nn.Linear(2, 2)
    assert not torch_internals.has_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert torch_internals.has_hooks(module)
    handle.remove()
    assert not torch_internals.has_hooks(module)


IN_ANOTHER_THREAD = """
import contextvars, threading, torch
from trifuse.kernels.torch_internals import context_of_backward

class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if threading.get_ident() != here:
            print(variable.get(), context_of_backward().get(variable), flush=True)
        else:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True)).backward()
        return grad

here, variable = threading.get_ident(), contextvars.ContextVar("variable", default=None)
for value in ("first", "second"):
    variable.set(value)
    Nested.apply(torch.ones(1, requires_grad=True)).backward()
"""


def test_a_compiler_that_first_runs_where_functions_are_replaced_knows_torch_s_own_afterwards():
    trace_rules.get_torch_obj_rule_map.cache_clear()
    torch.compiler.reset()
    with poisoned_empty():
        torch.compile(torch.sin, backend="eager", fullgraph=True)(torch.ones(2))
    known = trace_rules.get_torch_obj_rule_map.cache_info().misses
    zeros = torch.compile(lambda x: torch.empty(x.shape).zero_(), backend="eager", fullgraph=True)
    assert torch.equal(zeros(torch.ones(2)), torch.zeros(2))
    with poisoned_empty():
        pass
    torch.compile(lambda x: torch.empty(x.shape).zero_(), backend="eager", fullgraph=True)(torch.ones(2))
    assert trace_rules.get_torch_obj_rule_map.cache_info().misses <= known + 1, "what is right is kept"


@pytest.mark.parametrize("most", [1, 2])
def test_a_function_is_compiled_for_so_many_circumstances(most):
    torch.compiler.reset()
    compiled = torch.compile(torch.sin, backend="eager", fullgraph=True, dynamic=False)
    limit = torch_internals.compiling_up_to(most)
    for length in range(1, most + 1):
        with limit:
            compiled(torch.ones(length))
    with limit, pytest.raises(Exception, match="fullgraph=True"):
        compiled(torch.ones(9))


def test_a_backward_pass_is_compiled_with_its_forward_pass():
    torch.compiler.reset()
    called = []

    def compiler(graph, inputs):
        called.append(len(called))
        return make_boxed_func(graph)

    compiled = torch.compile(torch.sin, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=False)
    with torch_internals.compiling_backward_at_once():
        y = compiled(torch.ones(2, requires_grad=True))
    assert called == [0, 1]
    y.sum().backward()
    assert called == [0, 1]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="threads of a backward pass have no context there")
def test_a_backward_pass_in_another_thread_has_the_context_of_its_caller():
    """As on a GPU; on a CPU, PyTorch takes another thread from the sixtieth nested pass on."""
    child = run_python("-c", IN_ANOTHER_THREAD)
    assert child.stdout.splitlines() == ["None first", "None second"], child.stderr


def test_there_is_no_context_of_a_caller_outside_of_a_backward_pass():
    torch.ones(1, requires_grad=True).sum().backward()
    assert torch_internals.context_of_backward() is None


def test_flash_attention_has_a_shape_and_a_gradient_on_the_meta_device():
    q, k, v = (torch.empty(2, 3, tokens, 64, device="meta", requires_grad=True) for tokens in (5, 7, 7))
    with Seeing() as seen:
        out = torch_internals.flash_attention(q, k, v, 0.0, scale=0.5)[0]
        out.backward(torch.empty_like(out))
    assert out.shape == q.shape
    assert [each.grad.shape for each in (q, k, v)] == [q.shape, k.shape, v.shape]
    assert not [name for name in seen.names if "softmax" in name or "bmm" in name]
