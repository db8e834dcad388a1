"""What every operator shares: the operator namespace, argument checks, and the backend choice.

Backends:

==============  =============================================================================================
``triton``      the Triton kernels, through a registered operator; the default for GPU tensors
``torch``       the fast plain-PyTorch form, called directly; the default everywhere else
``reference``   the slow, obvious form that defines the operator; only when forced
==============  =============================================================================================

Types: float32, bfloat16 and float16 accumulate in float32 and return the input's type; float64 is computed in
float64 by the plain-PyTorch form on every device. Autocast changes nothing: operators run in the type they are
given. Attention alone follows autocast, as PyTorch's does.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, TypeVarTuple, cast

import torch
from torch import Tensor

from . import torch_internals
from .choices import check_choice
from .errors import BackendError, ShapeError, UnusableKernel
from .forcing import Forced, forced, forcing
from .namespace import NAMESPACE, define, registry
from .torch_internals import (
    constant_when_compiled,
    inside_backward,
    inside_transform,
    outside_of_modes,
)
from .torch_internals import under_functional_transform as under_functional_transform
from .torch_internals import without_values as without_values

BACKENDS = ("triton", "torch", "reference")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CUDA_CAPABILITY = (8, 0)
WITHOUT_KERNELS = {
    "dilated_attention_weights": "the map is there to be looked at",
    "memory_efficient_attention": "SDPA and xformers are already it",
}
"""Operators that have no Triton kernel, and why."""
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # found, not loaded

Given = ParamSpec("Given")
Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

_log = logging.getLogger("trifuse.kernels")
_compiled_on_cpu = False  # inside `trifuse.kernels.testing.virtual_gpu`
launched: defaultdict[str, int] = defaultdict(int)  # launches of each kernel in this process; a Counter costs more
_registered: set[str] = set()  # operators that have Triton kernels
_unusable: dict[tuple[str, torch.device], str] = {}  # why an operator's kernels could not be built there
_logged: set[tuple[str, str]] = set()  # operators and the backends that they were said to have chosen
_built: set[tuple[Any, ...]] = set()  # calls with gradients whose backward kernels were built: see `_with_backward`


class _Building(threading.local):
    """For which device this thread builds kernels at the moment, instead of launching them; None for none."""

    device: torch.device | None = None


building = _Building()


@contextmanager
def backend(name: str, *, strict: bool = True) -> Iterator[None]:
    """Force one backend for every operator called inside the block, in this thread or asynchronous task.

    Other threads choose for themselves, but for those that PyTorch runs a backward pass in: they see what its caller
    forced. A compiled function compiles anew where another backend is forced.

    Args:
        name: ``"triton"``, ``"torch"`` or ``"reference"``. A forced backend never falls back: where it cannot run,
            the operator raises `BackendError`.
        strict: False leaves operators alone that have no Triton kernel at all, such as attention: whole networks then
            run with ``"triton"`` forced.
    """
    check_choice("backend", name, BACKENDS, BackendError)
    with forcing(Forced(name, strict)):
        yield


@contextmanager
def compiled_on_cpu() -> Iterator[None]:
    """Let CPU tensors choose the Triton kernels inside the block, for a caller whose Triton driver runs them there."""
    global _compiled_on_cpu
    previous, _compiled_on_cpu = _compiled_on_cpu, True
    try:
        yield
    finally:
        _compiled_on_cpu = previous


@contextmanager
def failed_builds_forgotten() -> Iterator[None]:
    """Let operators try their kernels again after the block, whatever could not be built in it."""
    before = dict(_unusable)
    try:
        yield
    finally:
        _unusable.clear()
        _unusable.update(before)


def forced_backend(op: str = "") -> str | None:
    """Return the backend that is forced, on ``op`` if one is named; None if none is."""
    found = forced()
    return found.backend if found is not None and (found.strict or op not in WITHOUT_KERNELS) else None


def fallbacks() -> dict[str, str]:
    """Return the operators whose kernels could not be built in this process, and on which device and why."""
    return {op: f"{device}: {reason}" for (op, device), reason in _unusable.items()}


def choose_backend(op: str, tensor: Tensor) -> str:
    """Return the backend that ``op`` runs on for a tensor like ``tensor``; the first time, a debug line says why."""
    found = forced()
    if found is None:
        chosen, reason = default_backend(tensor.device, tensor.dtype, op)
        say_chosen(op, chosen, reason)
        return chosen
    if found.backend == "triton":
        obstacle = triton_obstacle(tensor.device, tensor.dtype)
        if obstacle:
            raise BackendError(f"{op}: the Triton backend was forced, but {obstacle}")
    return found.backend


def say_chosen(op: str, chosen: str, reason: str) -> None:
    """Say in a debug line, once, what an operator chose and why; compiled code has no lines."""
    if not torch.compiler.is_compiling() and (op, chosen) not in _logged:
        _logged.add((op, chosen))
        _log.debug("%s runs on the %s backend: %s", op, chosen, reason)


def default_backend(device: torch.device, dtype: torch.dtype, op: str = "") -> tuple[str, str]:
    """Return the backend chosen when none is forced, and the reason."""
    if _unusable and (op, device) in _unusable:
        return "torch", _unusable[op, device]
    if device.type == "cpu" and not _compiled_on_cpu:
        return "torch", "CPU tensors use plain PyTorch"
    obstacle = triton_obstacle(device, dtype)
    return ("torch", obstacle) if obstacle else ("triton", f"{device.type} tensors use Triton")


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Return what keeps the Triton kernels from running on such tensors; empty if nothing does."""
    if dtype not in TRITON_DTYPES:
        return f"the kernels have no {dtype} form; use {', '.join(map(str, TRITON_DTYPES))}"
    if device.type == "meta":
        return ""
    if not TRITON_INSTALLED:
        return "triton is not installed; run: pip install triton"
    if device.type == "cuda":
        return _gpu_obstacle(device.index or 0)
    if device.type == "cpu" and (_compiled_on_cpu or os.environ.get("TRITON_INTERPRET") == "1"):
        return ""
    return (
        f"it cannot run on {device.type} tensors (on a CPU, only with TRITON_INTERPRET=1 set before the first use, or "
        "inside `with trifuse.kernels.testing.virtual_gpu():`)"
    )


@constant_when_compiled  # tracing looks through a cache, and warns of it
def _gpu_obstacle(index: int) -> str:
    return _capability_obstacle(index)


@cache
def _capability_obstacle(index: int) -> str:
    if torch.version.hip is not None:
        return ""
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CUDA_CAPABILITY:
        return ""
    return f"compute capability {capability} of GPU {index} is below the oldest supported, {OLDEST_CUDA_CAPABILITY}"


@constant_when_compiled  # torch 2.10 cannot trace the question
def autocast_available(device_type: str) -> bool:
    """Return whether there is autocast for a kind of device: not for the meta device."""
    return torch.amp.is_autocast_available(device_type)


def register(
    schema: str,
    launch: Callable[[*Arguments], Result],
    meta: Callable[[*Arguments], Result],
    autograd: Callable[[*Arguments], Result] | None = None,
) -> Callable[[*Arguments], Result]:
    """Register ``trifuse::<schema>``: its Triton launch, its shape rule, and its gradient if it has one; return it.

    The launch serves GPU tensors, and CPU tensors where the Triton interpreter is on. Registration through
    `torch.library.Library` costs about half the host time per call of `torch.library.custom_op`. A gradient that is an
    operator of its own is registered after its operator, and named after it. What the gradient launches is built before
    the first forward pass that needs it returns.

    What is returned calls the operator. Where a dispatcher would find nothing but the gradient, it calls that at once,
    which calls the operator: modes and profilers see it as ever.
    """
    name = schema.split("(")[0]
    op = next((known for known in _registered if name.startswith(known)), name)
    _registered.add(op)
    launch = _named_after(op, launch)
    define(schema)
    registry.impl(name, launch, "CUDA")
    registry.impl(name, launch, "CPU")
    registry.impl(name, lambda *given: (meta if building.device is None else launch)(*given), "Meta")
    operator: Callable[[*Arguments], Result] = getattr(getattr(torch.ops, NAMESPACE), name).default
    if autograd is None:
        return operator
    differentiate = _with_backward(op, autograd)
    registry.impl(name, differentiate, "Autograd")

    def call(*arguments: *Arguments) -> Result:
        dispatched = torch.compiler.is_compiling() or not torch.is_grad_enabled() or inside_transform()
        return operator(*arguments) if dispatched else differentiate(*arguments)

    return call


def _with_backward(op: str, autograd: Callable[[*Arguments], Result]) -> Callable[[*Arguments], Result]:
    """Have a gradient's kernels built by the first forward pass that needs it, which can still choose plain PyTorch.

    What is needed is told by the device, the type, and which arguments have gradients, as autograd has found out.
    Another shape may need another form of a kernel; what keeps kernels from being built is hardly ever the shape.
    """

    def differentiate(*arguments: Any) -> Any:
        results: Any = autograd(*arguments)
        node: Any = (results if isinstance(results, Tensor) else results[0]).grad_fn
        if node is not None and building.device is None:
            first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
            call = (op, first.device, first.dtype, node.needs_input_grad)
            if call not in _built and _has_values(first, arguments):
                _build(autograd, arguments, first)
                _built.add(call)
        return results

    return cast("Callable[[*Arguments], Result]", differentiate)


def _has_values(first: Tensor, arguments: Sequence[Any]) -> bool:
    """Return whether a call is about to run on a device: what is asked for shapes alone needs no kernels."""
    return first.device.type != "meta" and not torch_internals.without_values(_tensors(arguments))


def _build(autograd: Callable[..., Any], arguments: Sequence[Any], first: Tensor) -> None:
    """Build all kernels of a call and of its gradient: called on tensors without memory, it launches nothing.

    Modes and hooks of the caller's see nothing of it.
    """
    no_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    building.device = first.device
    try:
        with outside_of_modes(), no_hooks, torch.cuda.device_of(first):
            listed = (list, tuple)
            given = [[*map(_without_memory, x)] if isinstance(x, listed) else _without_memory(x) for x in arguments]
            leaves = [tensor for tensor in _tensors(given) if tensor.requires_grad]
            results = autograd(*given)
            results = [result for result in _tensors([results]) if result.requires_grad]
            torch.autograd.grad(results, leaves, [torch.empty_like(result) for result in results], allow_unused=True)
    finally:
        building.device = None


def _without_memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return like.requires_grad_(value.requires_grad)


def _named_after(op: str, launch: Callable[[*Arguments], Result]) -> Callable[[*Arguments], Result]:
    """Wrap a launch: its errors name the operator, and devices on which its kernels cannot be built are remembered."""

    def launch_with_named_errors(*arguments: *Arguments) -> Result:
        try:
            return launch(*arguments)
        except (UnusableKernel, ImportError) as error:  # the latter from a triton that does not load
            device = building.device or _tensors(arguments)[0].device
            _unusable[op, device] = str(error)
            late = inside_backward() and building.device is None and forced() is None
            again = "repeat the step, which plain PyTorch then computes, or " if late else ""
            raise UnusableKernel(
                f"{op} on {device}: {error}; {again}run it inside: with trifuse.kernels.backend('torch')"
            ) from error
        except BackendError as error:
            raise BackendError(f"{op}: {error}") from error
        except torch.OutOfMemoryError as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(arguments))
            error.add_note(f"{op} asked for the memory of its result, for tensors of the shapes {shapes}")
            raise

    return launch_with_named_errors


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += [value for value in argument if isinstance(value, Tensor)]
    return found


def falls_back(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function that chooses a backend choose again where kernels cannot be built, with a warning that says why.

    Not where a backend was forced: then the error stays. From then on the operator chooses plain PyTorch at once.
    """

    @wraps(function)
    def with_fallback(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except UnusableKernel as error:
            if forced() is not None:
                raise
            warnings.warn(f"plain PyTorch takes over: {error}", RuntimeWarning, stacklevel=2)
        return function(*args, **kwargs)

    return with_fallback


def check_tensor(op: str, argument: str, value: object) -> None:
    """Refuse what is no tensor of this process, such as an array, a list of numbers, or a distributed tensor."""
    kind = type(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} is a {kind.__module__}.{kind.__qualname__}; expected a torch.Tensor")
    if kind.__name__ == "DTensor":
        raise TypeError(
            f"{op}: {argument} is a DTensor; expected a torch.Tensor of this process: pass {argument}.to_local() where "
            f"samples are sharded, or else {argument}.full_tensor()"
        )


def check_dtype(op: str, argument: str, tensor: Tensor) -> None:
    """Refuse types that the operators do not compute in, and what `check_tensor` does."""
    if type(tensor) is not Tensor:
        check_tensor(op, argument, tensor)
    check_float(op, argument, tensor.dtype)


def check_float(op: str, argument: str, dtype: torch.dtype) -> None:
    """Refuse types that the operators do not compute in."""
    if dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{op}: {argument} is {dtype}; expected one of {allowed}; convert it with .to(...)")


def check_shapes(
    op: str, given: Mapping[str, Tensor], expected: Mapping[str, tuple[str, tuple[int, ...]]], features: Tensor
) -> None:
    """Refuse arguments whose shape, in letters and in numbers, is not what a map asks for."""
    for name, (letters, shape) in expected.items():
        if given[name].shape != shape:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(given[name].shape)}; expected {letters} = {shape} for features of "
                f"shape {tuple(features.shape)}"
            )


def check_same_device(op: str, given: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
    """Refuse arguments that lie on different devices; of a sequence, each has its number after its name."""
    if len({tensor.device for tensor in _tensors(given.values())}) == 1:
        return
    places: dict[str, torch.device] = {}
    for name, value in given.items():
        named = {name: value} if isinstance(value, Tensor) else {f"{name}[{i}]": one for i, one in enumerate(value)}
        places |= {name: tensor.device for name, tensor in named.items()}
    check_one_device(op, places)


def check_one_device(op: str, devices: Mapping[str, torch.device]) -> None:
    """Refuse devices of arguments that differ."""
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ShapeError(f"{op}: expected all arguments on one device, got {places}; move them with .to(device)")


def values_at_hand(tensors: Sequence[Tensor]) -> bool:
    """Return whether values may be read: on a CPU, as a GPU would have to be waited for, and not while recording."""
    return all(tensor.device.type == "cpu" for tensor in tensors) and not without_values(tensors)
