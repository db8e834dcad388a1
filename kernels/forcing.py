"""Which backend is forced for the thread, or the task, that asks: a context variable.

Who else needs to know it finds it in other ways:

* `torch.compile` cannot trace a context variable, but guards the attributes of modules. Compiled code therefore reads
  the attribute ``here`` of this module, which is computed wherever it is read, and compiles anew where it differs. What
  compiled code forces itself is a global variable that is set while it is traced.
* A backward pass on a GPU runs in a thread of PyTorch's own, and repeats forward passes there under activation
  checkpointing. It sees what its caller forced: PyTorch carries the caller's context there, but for torch 2.10.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from .torch_internals import context_of_backward


class Forced(NamedTuple):
    """A backend, and whether it is forced upon operators without kernels, too."""

    backend: str
    strict: bool


_THIS = sys.modules[__name__]
_forced: ContextVar[Forced | None] = ContextVar("trifuse.kernels.forcing", default=None)
_traced: Forced | None = None  # what code forces that is being traced at the moment


@contextmanager
def forcing(forced: Forced) -> Iterator[None]:
    """Force a backend inside the block, in this thread or task and in the backward passes that it starts."""
    global _traced
    if torch.compiler.is_compiling():
        previous, _traced = _traced, forced
        try:
            yield
        finally:
            _traced = previous
        return
    token = _forced.set(forced)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> Forced | None:
    """Return what is forced here; None for nothing."""
    if _traced is not None:
        return _traced
    return _THIS.here if torch.compiler.is_compiling() else _here()


def __getattr__(name: str) -> Any:
    if name == "here":
        return _here()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _here() -> Forced | None:
    found = _forced.get()
    if found is None and (context := context_of_backward()) is not None:
        return context.get(_forced)
    return found
