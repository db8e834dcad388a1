"""First derivatives: an operator's gradient that is differentiated once more is refused, not taken for a constant."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]
REFUSAL = (
    "a gradient of {name} is differentiated once more, and the operator is once_differentiable; "
    "compute it inside: with trifuse.kernels.backend('reference')"
)


def once_differentiable(backward: Backward) -> Backward:
    """Make the backward of a `torch.autograd.Function` refuse second derivatives.

    PyTorch's function of this name refuses only where the incoming gradient needs a gradient itself. That of a plain
    sum does not, and its second derivative would be nothing, without a word.

    Raises:
        RuntimeError: by the backward that is returned, in the backward pass through its results.
    """
    name = backward.__qualname__.rpartition(".")[0]

    @wraps(backward)
    def first(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        alone = isinstance(results, Tensor)
        refusing = [x if x is None else _Refusing.apply(name, _anchor(x), x) for x in ([results] if alone else results)]
        return refusing[0] if alone else tuple(refusing)

    return first


def _anchor(tensor: Tensor) -> Tensor:
    """Return something that needs a gradient, so that what comes of it does."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device, requires_grad=True)


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, anchor: Tensor, gradient: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(REFUSAL.format(name=ctx.name))
