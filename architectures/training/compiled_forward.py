"""The forward pass of training as code that `torch.compile` makes of it, with the backward pass that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class CompiledForward:
    """Compute what a function computes of a network and a batch: compiled, as one graph, or eagerly where that fails.

    Each shape of a batch gets code of its own, so that what a step computes does not depend on the shapes before it: a
    resumed run ends with the bits of one that was not interrupted. Random numbers are those of the eager pass.

    Args:
        forward: ``forward(model, batch)``.
        say: takes the line that says what was compiled, or why it was not.
    """

    def __init__(self, forward: Callable[[nn.Module, Any], Any], say: Callable[[str], None]) -> None:
        torch.compiler.reset()  # what was compiled before, for other networks, counts for the most that there may be
        self._eager, self._say = forward, say
        self._compiled: Callable[[nn.Module, Any], Any] | None = None
        self._is_compiled: bool | None = None  # None until it was tried

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return ``forward(model, batch)``."""
        if self._is_compiled is False:
            return self._eager(model, batch)
        try:
            outputs = self._compile()(model, batch)
        except torch.OutOfMemoryError:
            raise  # no fault of the compiler's
        except Exception as error:
            outputs = self._eager(model, batch)  # which raises what was no fault of the compiler's
            since = " from here on" if self._is_compiled else ""
            self._is_compiled = False
            self._say(f"{self._name(model)} runs eagerly{since}, as it cannot be compiled: {_reason(error)}")
            return outputs
        if self._is_compiled is None:
            self._is_compiled = True
            self._say(f"{self._name(model)} is compiled, as one graph")
        return outputs

    def _compile(self) -> Callable[[nn.Module, Any], Any]:
        if self._compiled is None:
            options: dict[str, Any] = {"fallback_random": True}
            self._compiled = torch.compile(self._eager, fullgraph=True, dynamic=False, options=options)
        return self._compiled

    @staticmethod
    def _name(model: nn.Module) -> str:
        return f"the forward pass of {type(model).__name__}"


def _reason(error: Exception) -> str:
    """Return the kind of an error and the line that says what is wrong: the second one, where the first names a place.

    What a compiler has to say goes on for pages.
    """
    first, second = [*str(error).strip().splitlines(), "", ""][:2]
    return f"{type(error).__name__}: {first} {second if first.endswith(':') else ''}".rstrip()
