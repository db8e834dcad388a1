"""The private names of torch that trifuse uses, all of them, and nothing else.

Any of them may change in a later torch. `tests/kernels/test_torch_internals.py` shows of each that it does what is
relied on here, in every supported version (``make versions``); no other file of trifuse uses a private name of torch.

==================================  ================================================  ================================
Private name                        What it does                                      What is public instead
==================================  ================================================  ================================
``_AutoDispatchBelowAutograd``      calls an operator's kernels from inside its       `torch.library.custom_op`, which
                                    gradient's registration, without a loop           costs the host twice the time
``forward_ad._current_level``       tells forward-mode differentiation: -1 outside    nothing
``peek_interpreter_stack``          tells transforms of `torch.func`: None outside    nothing
``is_functorch_wrapped_tensor``     tells the tensors that such a transform is about  nothing
``_get_dispatch_mode``, ``PROXY``,  tells that operations are recorded (`make_fx`),   nothing
``FAKE``                            or only shapes computed (`FakeTensorMode`)
``detect_fake_mode``                tells tensors with shapes and no values           nothing
``_dynamo_marked_constant``         has `torch.compile` call a function, and keep     `assume_constant_result`, which
                                    its result, instead of tracing it                 loads the compiler at import
``_dynamo.config``                  says how often a function is compiled again       `torch.compiler.config`, not in
                                                                                      every supported version
``get_torch_obj_rule_map``          the functions of torch that `torch.compile` has   nothing
                                    found, and keeps
``_functorch.config``               has a backward pass compiled with the forward     nothing
                                    pass, and not when it runs
``_current_graph_task_id``          tells a running backward pass: -1 outside         nothing
``kineto_results``, ``_EventType``  each allocation and release of the profiler       its memory timeline, which needs
                                    on a CPU                                          files, and rounds
``TorchDispatchMode``               sees every operator that a call reaches           nothing
``FakeTensorMode``                  computes shapes and types alone, of a network     nothing
                                    that has its weights
``_disable_current_modes``          hides operators from all of these, the caller's   nothing
                                    included
``_scaled_dot_product_flash_...``   attends in one operation, on the meta device too  `scaled_dot_product_attention`,
                                                                                      which there writes the weights
``_op_dk``, ``DispatchKey``         calls one operator's kernel for a CPU             nothing
``_get_obj_in_tls``                 the context variables of who started a backward    nothing
``_is_key_in_tls``                  pass, in the threads that run it
``_forward_hooks`` and the like     tell whether a module has hooks                   nothing
``_parameters``                     the parameters that a module itself holds         `Module.parameters`, which takes
                                                                                      ten times as long
==================================  ================================================  ================================
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

Answering = TypeVar("Answering", bound=Callable[..., object])

# The functions themselves: what stands between them and a call would be paid at every call.
below_autograd = torch._C._AutoDispatchBelowAutograd
outside_of_modes = torch.utils._python_dispatch._disable_current_modes
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
_dispatch_mode = torch._C._get_dispatch_mode
_backward_pass = torch._C._current_graph_task_id
_TRACE_RULES = "torch._dynamo.trace_rules"
_RECORDING, _FAKING = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def flash_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, *, scale: float | None) -> tuple[Any, ...]:
    """Attend, from (B, heads, tokens, width); the result comes first. For shapes alone: what computes asks SDPA."""
    results: tuple[Any, ...] = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, scale=scale)
    return results


def inside_transform() -> bool:
    """Return whether a transform of `torch.func` is active, whatever tensors it is about; not for a compiler to ask."""
    return _innermost_transform() is not None


def under_functional_transform(tensors: Sequence[Tensor]) -> bool:
    """Return whether vmap, functional or forward-mode differentiation is active, which need a composable form."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if _innermost_transform() is None:  # asked once for all tensors: most calls end here
        return False
    return any(_is_transformed(tensor) for tensor in tensors)


def without_values(tensors: Sequence[Tensor]) -> bool:
    """Return whether operations are recorded or only their shapes computed, so that no value may be read.

    Whether tensors lie on a device that has values, their callers know: the meta device has none.
    """
    if torch.compiler.is_compiling() or _dispatch_mode(_RECORDING) is not None or _dispatch_mode(_FAKING) is not None:
        return True
    for tensor in tensors:  # of a type of their own where they have no values; most calls end here
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            return detect_fake_mode(tensors) is not None
    return False


def computing_shapes_alone() -> AbstractContextManager[object]:
    """Return a context in which operators compute shapes and types, no values, whatever tensors they are given."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def constant_when_compiled(function: Answering) -> Answering:
    """Have `torch.compile` call a function while it traces and keep its result, instead of tracing the function."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def replacing_functions() -> Iterator[None]:
    """Let functions of torch be replaced in the block; a compiler that first runs there takes none for torch's own."""
    knew_them = _functions_known()
    try:
        yield
    finally:
        if not knew_them and _functions_known():
            sys.modules[_TRACE_RULES].get_torch_obj_rule_map.cache_clear()


def _functions_known() -> bool:
    rules = sys.modules.get(_TRACE_RULES)
    return rules is not None and rules.get_torch_obj_rule_map.cache_info().currsize > 0


def compiling_up_to(times: int) -> AbstractContextManager[object]:
    """Return a context, to be entered as often as one likes, in which a function has code for so many circumstances."""
    context: AbstractContextManager[object] = torch._dynamo.config.patch(recompile_limit=times)
    return context


def compiling_backward_at_once() -> AbstractContextManager[object]:
    """Return a context like `compiling_up_to`, in which a backward pass is compiled with its forward pass.

    Elsewhere it is compiled when it first runs.
    """
    import torch._functorch.config

    context: AbstractContextManager[object] = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return context


def inside_backward() -> bool:
    """Return whether a backward pass is running, as when checkpointing repeats a forward pass; never for a compiler."""
    return not torch.compiler.is_compiling() and _backward_pass() != -1


def context_of_backward() -> Context | None:
    """Return the context variables of the thread that started this backward pass, where another one may run it.

    None outside of one, and in torch 2.10, which carries none to its threads.
    """
    return (
        torch._C._get_obj_in_tls("context") if _backward_pass() != -1 and torch._C._is_key_in_tls("context") else None
    )


def allocations(profile: Any) -> Iterator[tuple[int, int]]:
    """Yield when PyTorch's allocator gave or took back memory, in ns, and how many bytes, negative if taken back.

    Args:
        profile: a `torch.profiler.profile` that has ended, with ``profile_memory=True``.
    """
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.typed[1].alloc_size
        pending.extend(event.children)


def call_cpu_kernel(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Call what an operator (``torch.ops.<namespace>.<name>.default``) registered for CPU tensors, and only that."""
    return operator._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)


def has_hooks(module: torch.nn.Module) -> bool:
    """Return whether a call of a module runs hooks of its own beside its forward.

    Hooks of all modules at once do not count: PyTorch means them for profiling, which is to see what runs without them.
    """
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def own_parameters(module: torch.nn.Module) -> Iterable[Parameter | None]:
    """Return the parameters that a module itself holds, not those of its parts; None stands for one it does without."""
    return module._parameters.values()
