"""Operators on their Triton kernels or not at all: forced, and the launches counted that prove it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_arguments import keywords, without_keywords
from torch import Tensor

from trifuse import kernels
from trifuse.kernels import backend
from trifuse.kernels.library import WITHOUT_KERNELS
from trifuse.kernels.testing import launches


@contextmanager
def on_kernels(what: str, *, expected: bool = True) -> Iterator[None]:
    """Force the Triton backend inside the block, and refuse it unless kernels were launched there.

    Args:
        what: an operator or a network, for the message; an operator that has no kernels must launch none.
        expected: whether kernels must be launched, or must not.
    """
    with backend("triton", strict=False), launches() as counted:
        yield
    assert not counted.fallbacks, f"{what}: {counted.fallbacks}"
    expected = expected and what not in WITHOUT_KERNELS
    assert bool(counted.kernels) == expected, f"{what}: kernels expected: {expected}, launched: {counted.kernels}"


def step_on_kernels(name: str, arguments: tuple[Any, ...], operator: Callable[..., Tensor] | None = None) -> list:
    """Call an operator, and take the gradients of the sum of its squares; each of the two must launch kernels.

    Returns:
        The result or results, and the gradients of the arguments that require one.
    """
    operator = operator or getattr(kernels, name)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    with on_kernels(name):
        out = operator(*without_keywords(arguments), **keywords(arguments))
    if not leaves:
        return [out]
    with on_kernels(f"{name}, backward", expected=name not in WITHOUT_KERNELS):
        outs = [out] if isinstance(out, Tensor) else out
        gradients = torch.autograd.grad(sum(one.square().sum() for one in outs), leaves)
    return [*(one.detach() for one in outs), *gradients]
