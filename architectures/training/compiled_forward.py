"""The forward pass of training as code that `torch.compile` makes of it, with the backward pass that belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.architectures.storage.text import count
from trifuse.kernels.torch_internals import compiling_backward_at_once, compiling_up_to

from .signals import Interrupted

MOST_SHAPES = 8  # of batches that get code of their own: each takes its time to compile


@dataclass
class Compilation:
    """What of a run is compiled: a run that is resumed goes on in the same way. Steps are counted from 1.

    Attributes:
        shapes: of the batches that compiled code computes, and the first step that had each.
        surplus_since: the first step with a batch of one more shape than `MOST_SHAPES`; such batches run eagerly.
        eager_since: the step from which every batch runs eagerly.
        reason: why that one could not be compiled.
    """

    shapes: dict[str, int] = field(default_factory=dict)
    surplus_since: int | None = None
    eager_since: int | None = None
    reason: str = ""

    def describe(self) -> str:
        """Say it in words."""
        parts = []
        if self.shapes:
            shapes = count(len(self.shapes), "shape")
            parts.append(f"compiled from step {min(self.shapes.values())} on, for batches of {shapes}")
        if self.surplus_since is not None:
            parts.append(f"batches of other shapes eager from step {self.surplus_since} on")
        if self.eager_since is not None:
            parts.append(f"all eager from step {self.eager_since} on, as it could not be compiled: {self.reason}")
        return "; ".join(parts)


class CompiledForward:
    """Compute what a function computes of a network and a batch: compiled, as one graph, or eagerly where that fails.

    Each shape of a batch gets code of its own, so that what a step computes does not depend on the shapes before it: a
    resumed run ends with the bits of one that was not interrupted. Random numbers are those of the eager pass.

    Args:
        forward: ``forward(model, batch)``.
        say: takes the line that says what was compiled, or why it was not.
        stopping: tells whether the run was asked to stop.

    Attributes:
        compilation: what has been compiled.
        step: the current one, counted from 1.
    """

    def __init__(
        self, forward: Callable[[nn.Module, Any], Any], say: Callable[[str], None], stopping: Callable[[], bool]
    ) -> None:
        torch.compiler.reset()  # what was compiled before, for other networks, counts for the most that there may be
        self.compilation, self.step = Compilation(), 1
        self._eager, self._say, self._stopping = forward, say, stopping
        self._said: set[str] = set()
        self._compiled: Callable[[nn.Module, Any], Any] | None = None
        # A network may change its mind once for every shape, as one that freezes what it learned to select.
        self._limit = compiling_up_to(2 * MOST_SHAPES)
        # Or the backward pass would be compiled later, where nothing can be computed again.
        self._at_once = compiling_backward_at_once()

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return ``forward(model, batch)``.

        Raises:
            Interrupted: it could not be compiled, and the run was asked to stop, maybe by what ended the compiler.
        """
        name, shape = f"the forward pass of {type(model).__name__}", _shapes_in(batch)
        if not self._is_to_be_compiled(name, shape):
            return self._eager(model, batch)
        try:
            with self._limit, self._at_once:
                outputs = self._compile()(model, batch)
        except torch.OutOfMemoryError:
            raise  # no fault of the compiler's
        except Exception as error:
            if self._stopping():
                raise Interrupted(f"{name} was not compiled: {_reason(error)}") from error
            outputs = self._eager(model, batch)  # which raises what was no fault of the compiler's
            self.compilation.eager_since, self.compilation.reason = self.step, _reason(error)
            self._is_to_be_compiled(name, shape)  # which says so
            return outputs
        self.compilation.shapes.setdefault(shape, self.step)
        self._say_once(f"{name} is compiled, as one graph")
        return outputs

    def _is_to_be_compiled(self, name: str, shape: str) -> bool:
        """Tell whether a batch of a shape is for compiled code; if it is not, say why."""
        known = self.compilation
        if known.eager_since is not None:
            since = f"from step {known.eager_since} on"
            self._say_once(f"{name} runs eagerly {since}, as it could not be compiled: {known.reason}")
            return False
        if shape not in known.shapes and len(known.shapes) >= MOST_SHAPES:
            known.surplus_since = known.surplus_since or self.step
            self._say_once(f"{name} runs eagerly for batches of other shapes than the first {MOST_SHAPES}")
            return False
        return True

    def _compile(self) -> Callable[[nn.Module, Any], Any]:
        if self._compiled is None:
            options: dict[str, Any] = {"fallback_random": True}
            self._compiled = torch.compile(self._eager, fullgraph=True, dynamic=False, options=options)
        return self._compiled

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def _shapes_in(part: Any) -> str:
    """Return the types and shapes of the tensors in a batch: what code is compiled for."""
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')}{list(part.shape)}"
    if isinstance(part, Mapping):
        named = {name: _shapes_in(each) for name, each in part.items()}
        return ", ".join(f"{name} {shapes}" for name, shapes in named.items() if shapes)
    return ", ".join(filter(None, map(_shapes_in, part))) if isinstance(part, list | tuple) else ""


def _reason(error: Exception) -> str:
    """Return the kind of an error and the line that says what is wrong: the second one, where the first names a place.

    What a compiler has to say goes on for pages.
    """
    first, second = [*str(error).strip().splitlines(), "", ""][:2]
    return f"{type(error).__name__}: {first} {second if first.endswith(':') else ''}".rstrip()
