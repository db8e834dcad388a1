"""First derivatives: an operator's gradient that is differentiated once more is refused, not taken for a constant."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, TypeVarTuple

import torch
from torch import Tensor

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result", covariant=True)
Backward = Callable[..., Any]
REFUSAL = (
    "a gradient of {name} is differentiated once more, and the operator is once_differentiable; "
    "compute it inside: with trifuse.kernels.backend('reference')"
)


class ForwardContext(Protocol):
    """What PyTorch hands the forward pass of a `torch.autograd.Function`; the backward pass finds what is set on it."""

    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep arguments or results for the backward pass."""

    def mark_non_differentiable(self, *results: Tensor) -> None:
        """Declare results that have no gradient."""

    def set_materialize_grads(self, value: bool, /) -> None:
        """Say whether gradients of results that nobody used come as zeros, or as None."""

    def __setattr__(self, name: str, value: object, /) -> None: ...


class BackwardContext(Protocol):
    """What PyTorch hands the backward pass of a `torch.autograd.Function`."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]  # tensors, and None where None was saved

    def __getattr__(self, name: str, /) -> Any: ...


class _HasForward(Protocol[*Arguments, Result]):
    @staticmethod
    def forward(ctx: ForwardContext, /, *arguments: *Arguments) -> Result: ...


if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """`torch.autograd.Function` itself, but that a type checker knows ``apply`` by the types of ``forward``."""

        @classmethod
        def apply(cls: type[_HasForward[*Arguments, Result]], *arguments: *Arguments) -> Result: ...
else:
    Function = torch.autograd.Function


def once_differentiable(backward: Backward) -> Backward:
    """Make the backward of a `torch.autograd.Function` refuse second derivatives.

    A gradient depends on what was saved for it and on the incoming gradients. Those that need a gradient become the
    parents of a node that raises: a backward pass that names its inputs runs only the nodes on the way to them. What a
    gradient depends on must therefore be saved as it was given, or as it was returned.

    PyTorch's function of this name refuses only where an incoming gradient needs a gradient itself. That of a plain
    sum does not, and its second derivative would be nothing, without a word.

    Raises:
        RuntimeError: by the backward that is returned, in the backward pass through its results.
    """
    name = backward.__qualname__.rpartition(".")[0]

    @wraps(backward)
    def first(ctx: BackwardContext, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        saved = ctx.saved_tensors  # once: activation checkpointing computes them anew, and refuses to do so again
        unpacked = SimpleNamespace(**vars(ctx), saved_tensors=saved, needs_input_grad=ctx.needs_input_grad)
        with torch.no_grad():
            results = backward(unpacked, *grads)
        parents = [x for x in (*saved, *grads) if x is not None and x.requires_grad]
        if isinstance(results, Tensor):
            return _Refusing.apply(name, results, *parents)
        return tuple(x if x is None else _Refusing.apply(name, x, *parents) for x in results)

    return first


class _Refusing(Function):
    @staticmethod
    def forward(ctx: ForwardContext, name: str, gradient: Tensor, *parents: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: BackwardContext, *grads: Tensor) -> Any:
        raise RuntimeError(REFUSAL.format(name=ctx.name))
