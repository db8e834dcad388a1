"""Kernels of a gradient are built before the first forward pass returns; what asks for too much is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from operator_calls import OPERATORS, calls_of
from torch.testing import assert_close

from trifuse.kernels import BackendError, backend, library, spatial_gate
from trifuse.kernels.testing import launches
from trifuse.kernels.torch_internals import TorchDispatchMode

triton = pytest.importorskip("triton", reason="these are Triton's launches")

from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from trifuse.kernels.gpu import launching  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="patches the interpreter")
DIFFERENTIABLE = [op for op in OPERATORS if op != "upsample_argmax"]
OBSTACLES = [
    PTXASError("Value 'sm_999' is not defined for option 'gpu-name'"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
    PermissionError(13, "Permission denied", "/cache"),
]


def calls(op):
    return calls_of(op, (1, 2, 2, 3))


def kernels_of_forward(call):
    with torch.no_grad(), backend("triton"), launches() as counted:
        call()
    return set(counted.kernels)


def gradients(call):
    result = call()
    return [result.detach(), *torch.autograd.grad(result.square().sum(), call.leaves())]


@pytest.fixture
def refuse(monkeypatch):
    """Return what has kernels fail to be built, except for those that are named."""

    def refuse_others(error, *usable):
        run = InterpretedFunction.run

        def run_or_refuse(kernel, *arguments, **settings):
            if kernel.fn.__name__ in usable:
                return run(kernel, *arguments, **settings)
            raise error

        monkeypatch.setattr(InterpretedFunction, "run", run_or_refuse)

    return refuse_others


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_k31_a_gradient_that_cannot_be_built_makes_plain_pytorch_take_over_before_forward(
    op, like_a_gpu, refuse, monkeypatch
):
    usable = set().union(*(kernels_of_forward(call) for call in calls(op)))
    refuse(OBSTACLES[0], *usable)
    for call in calls(op):
        with backend("torch"):
            expected = gradients(call)
        monkeypatch.setattr(library, "_unusable", {})
        with pytest.warns(RuntimeWarning, match=f"plain PyTorch takes over: {op} on cpu: .*sm_999") as warned:
            found = gradients(call)
        assert len(warned) == 1
        assert_close(found, expected)
        with backend("triton"), pytest.raises(BackendError, match=f"{op} on cpu: .*sm_999"):
            call()


@pytest.mark.parametrize("error", OBSTACLES, ids=str)
def test_k31_whatever_keeps_a_gradient_from_being_built(error, like_a_gpu, refuse):
    (call,) = calls("spatial_gate")
    refuse(error, *kernels_of_forward(call))
    with pytest.warns(RuntimeWarning, match="plain PyTorch takes over") as warned:
        found = gradients(call)
    (message,) = [str(warning.message) for warning in warned]
    assert " ".join(str(error).split()) in message
    assert ("TRITON_CACHE_DIR" in message) == isinstance(error, OSError)
    with backend("torch"):
        assert_close(found, gradients(call))


def test_k32_a_gradient_that_needs_too_much_is_refused_by_forward(like_a_gpu, refuse):
    (call,) = calls("channel_gate")
    refuse(OutOfResources(300000, 232448, "shared memory"), *kernels_of_forward(call))
    with pytest.raises(BackendError, match="channel_gate: _channel_gate_bwd_kernel needs 300000 of shared memory"):
        call()
    assert library.fallbacks() == {}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_kernels_are_built_once_for_each_set_of_gradients_and_none_is_launched(op, like_a_gpu, monkeypatch):
    built = []
    run = InterpretedFunction.run

    def seen(kernel, *arguments, warmup, **settings):
        built.extend([kernel.fn.__name__] if warmup else [])
        return run(kernel, *arguments, warmup=warmup, **settings)

    monkeypatch.setattr(InterpretedFunction, "run", seen)
    for call in calls(op):
        monkeypatch.setattr(library, "_built", set())
        built.clear()
        with torch.no_grad():
            call()
        assert built == []
        with launches() as forward:
            result = call()
        assert set(forward.kernels) < set(built)
        with launches() as backward:
            torch.autograd.grad(result.square().sum(), call.leaves())
        assert set(built) == {*forward.kernels, *backward.kernels}
        built.clear()
        gradients(call)
        assert built == []
    call.leaves()[0].requires_grad_(False)
    if call.leaves():
        call()
        assert built != []


def test_another_type_has_its_own_kernels_built(like_a_gpu, monkeypatch):
    built = []
    monkeypatch.setattr(library, "_build", lambda autograd, arguments, first: built.append(first.dtype))
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        spatial_gate(torch.ones(1, 2, 2, 3, dtype=dtype, requires_grad=True), torch.ones(1, 1, 2, 3, dtype=dtype))
    assert built == [torch.float32, torch.bfloat16]


def test_what_is_built_is_hidden_from_the_caller_s_hooks_and_modes(like_a_gpu):
    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.devices = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.devices |= {arg.device.type for arg in args if isinstance(arg, torch.Tensor)}
            return func(*args, **(kwargs or {}))

    saved = []
    (call,) = calls("temporal_film_gate")
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.device.type) or x, lambda x: x)
    with Recorder() as recorder, hooks:
        call()
    assert library._built
    assert recorder.devices == {"cpu"}
    assert set(saved) == {"cpu"}


def test_one_thread_builds_while_another_launches(like_a_gpu, monkeypatch):
    (call,) = calls("spatial_gate")
    launched = []

    def elsewhere():
        with torch.no_grad(), launches() as counted:
            call()
        launched.extend(counted.kernels)

    monkeypatch.setattr(library.building, "device", torch.device("cpu"))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert launched == ["_gate_fwd_kernel"]


@pytest.mark.parametrize("op", OPERATORS)
def test_kernels_are_launched_on_the_device_of_their_arguments(op, like_a_gpu, monkeypatch):
    """Another GPU than that of the tensors may be the current one: every launch is inside of `torch.cuda.device_of`."""
    entered, seen = [], []

    class DeviceOf(torch.cuda.device_of):
        def __init__(self, tensor):
            super().__init__(tensor)
            self.device = tensor.device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.pop()

    def look(kernel, grid, *arguments, **settings):
        tensors = list(launching._tensors(arguments))
        seen.append(kernel.fn.__name__)
        assert entered, kernel.fn.__name__
        assert {entered[-1]} == {tensor.device for tensor in tensors}

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(launching, "launch", look)
    for call in calls(op):
        result = call()
        if call.leaves():
            torch.autograd.grad(result.square().sum(), call.leaves())
    assert seen


# --------------------------------------------------------------------------------------------- more than there may be


@pytest.mark.parametrize("op", OPERATORS)
def test_k18_more_programs_than_a_grid_has_are_refused_before_the_launch(op, like_a_gpu, monkeypatch):
    monkeypatch.setattr(launching, "MOST_PROGRAMS", 2)
    with backend("triton"), launches() as counted:
        for call in calls_of(op, (3, 20, 64, 3)):  # more channels than programs of batch norm share
            with torch.no_grad(), pytest.raises(BackendError) as caught:
                call()
            for words in (f"{op}: _", "programs where a launch has 2", "shapes (3, ", "split the batch", "'torch'"):
                assert words in str(caught.value)
    assert counted.kernels.total() <= 1  # the depthwise kernels are merged before
    assert library.fallbacks() == {}


def test_k18_a_grid_ends_at_2_to_the_31():
    assert launching.MOST_PROGRAMS == 2**31 - 1
    with pytest.raises(BackendError, match="needs 2147483648 programs where a launch has 2147483647"):
        launching.launch(triton.jit(lambda: None), (2**31,))


@pytest.mark.parametrize("op", ["channel_gate", "spatial_gate", "monte_carlo_pool", "temporal_film_gate"])
def test_k17_maps_of_more_positions_than_kernels_number_are_refused(op, monkeypatch):
    monkeypatch.setattr(launching, "MOST_POSITIONS", 5)
    with backend("triton"), launches() as counted:
        for call in calls(op):
            with pytest.raises(
                BackendError, match=rf"{op}: a map of 2 x 3 has more than 5 positions.*crop it.*'torch'"
            ):
                call()
    assert counted.kernels.total() == 0


def test_k17_the_most_positions_that_kernels_number_are_taken():
    launching.check_positions(1 << 15, 1 << 15)
    with pytest.raises(BackendError, match="a map of 1 x 1073741825 has more than 1073741824 positions"):
        launching.check_positions(1, (1 << 30) + 1)


def test_k17_attention_over_more_positions_than_kernels_number_is_refused():
    pixel = torch.zeros(1, 1, 1, 3, dtype=torch.bfloat16, device="meta")
    wide = pixel.expand(1, 1 << 15, (1 << 15) + 1, 3)
    gpu = pytest.importorskip("trifuse.kernels.gpu.dilated_attention")
    with pytest.raises(BackendError, match="a map of 32768 x 32769 has more than 1073741824 positions"):
        gpu.forward([wide] * 3, 3, (1, 2, 3), 1.0, "zero")


def test_for_tensors_on_the_meta_device_nothing_is_built(refuse, recwarn):
    """A network is traced there to count its parameters or its bytes, often without any GPU."""
    refuse(OBSTACLES[0])
    x = torch.empty(1, 8, 4, 4, device="meta", requires_grad=True)
    spatial_gate(x, torch.empty(1, 1, 4, 4, device="meta")).sum().backward()
    assert x.grad.shape == x.shape
    assert (list(recwarn), library.fallbacks()) == ([], {})
