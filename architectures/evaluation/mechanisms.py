"""What a network is made of, as a table of mechanisms, and what switches each of them for the time of a context.

A `Mechanism` is a row: its name, what is done to it in words, and what does it. A switch changes the network inside a
context and leaves no trace behind it: `zeroed`, `skipped`, `answering` and `cut` answer in a layer's place, `holding`
gives parameters other values and `attributes` a module other methods. An exchange changes what cases bring beside their
images. A `Watch` records what a network computes for each image, so that a switch can hold it at its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.architectures.data.samples.side_inputs import SideInputs

Context = AbstractContextManager[Any]
Inputs = Mapping[str, SideInputs]
"""What cases bring beside their images, by case."""
Means = Mapping[str, Tensor]
"""The mean over images of what was watched, by the name of the watch, without the batch."""


@dataclass(frozen=True)
class Watch:
    """Something that a network computes anew for each image, such as the weights of a gate.

    Attributes:
        name: of it.
        record: ``record(model, keep)`` returns a context in which every pass calls ``keep`` with the values, (B, ...).
    """

    name: str
    record: Callable[[Any, Callable[[Tensor], object]], Context]


@dataclass(frozen=True)
class Mechanism:
    """A part of a network, and how to find out whether it does anything.

    Attributes:
        name: of the part and of what is done to it, a few words that no other mechanism of the network has.
        change: what is done to it, a sentence.
        switch: ``switch(model, means)`` returns a context in which the network works without it, or otherwise.
        exchange: returns, for the cases that it changes, other inputs beside the image; {} where it changes none.
        watches: what ``means`` is to hold.
        unmeasured: why it cannot be measured on this network; neither switch nor exchange is then needed.

    Raises:
        ValueError: none of switch, exchange and reason, or more than one of them.
    """

    name: str
    change: str
    switch: Callable[[Any, Means], Context] | None = None
    exchange: Callable[[Inputs], Inputs] | None = None
    watches: tuple[Watch, ...] = ()
    unmeasured: str = ""

    def __post_init__(self) -> None:
        given = [word for word in ("switch", "exchange", "unmeasured") if getattr(self, word)]
        if len(given) != 1:
            raise ValueError(
                f"mechanism {self.name!r}: expected one of switch, exchange and unmeasured, got "
                f"{' and '.join(given) or 'none'}; measure it in one way, or say why it cannot be"
            )


# --------------------------------------------------------------------------------- contexts that change a network


@contextmanager
def together(contexts: Iterable[Context]) -> Iterator[None]:
    """Enter all contexts."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def answering(modules: Iterable[nn.Module], answer: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Replace the result of each module's forward pass by ``answer(first argument, result)``; None leaves it."""
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_hook(lambda module, given, result: answer(given[0], result))
            stack.callback(hook.remove)
        yield


def zeroed(modules: Iterable[nn.Module]) -> Context:
    """Let modules return zeros in place of their maps."""
    return answering(modules, lambda given, result: _zeros(result))


def skipped(modules: Iterable[nn.Module]) -> Context:
    """Let modules return what they are given."""
    return answering(modules, lambda given, result: given)


def _zeros(result: Any) -> Any:
    return torch.zeros_like(result) if isinstance(result, Tensor) else type(result)(map(_zeros, result))


@contextmanager
def cut(modules: Iterable[nn.Module], channels: slice, dim: int = 1) -> Iterator[None]:
    """Set some channels of what modules are given to zero, those of dimension ``dim``."""

    def without(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x = given[0].clone()
        x.movedim(dim, 0)[channels] = 0
        return (x, *given[1:])

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(without).remove)
        yield


@contextmanager
def holding(values: Iterable[tuple[Tensor, Tensor | float]]) -> Iterator[None]:
    """Give parameters and buffers other values, each a tensor of its shape or a number; afterwards the old bits."""
    pairs = [(tensor, tensor.detach().clone(), value) for tensor, value in values]
    try:
        with torch.no_grad():
            for tensor, _, value in pairs:
                tensor.copy_(torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device).expand_as(tensor))
        yield
    finally:
        with torch.no_grad():
            for tensor, before, _ in pairs:
                tensor.copy_(before)


@contextmanager
def attributes(owner: nn.Module, **values: Any) -> Iterator[None]:
    """Give one module other methods, or other attributes that are neither tensors nor modules, by their names."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)


# ------------------------------------------------------------------------------------- exchanges between cases


def exchanged(
    inputs: Inputs, names: Sequence[str], take: Callable[[SideInputs, SideInputs], SideInputs | None]
) -> dict[str, SideInputs]:
    """Give each named case something of another one, as far from it in the order of the names as it can be.

    Args:
        inputs: of all cases.
        names: the cases that have something to exchange, in an order in which distant ones differ.
        take: makes new inputs of a case's own and another's; None where they would be the same, and it is left out.
    """
    others = [*names[len(names) // 2 :], *names[: len(names) // 2]]
    pairs = [(name, other) for name, other in zip(names, others, strict=True) if name != other]
    found = {name: take(inputs[name], inputs[other]) for name, other in pairs}
    return {name: each for name, each in found.items() if each is not None}


def with_constants(inputs: SideInputs, **constants: Tensor) -> SideInputs:
    """Return the inputs of a case with other constants."""
    return replace(inputs, constants={**inputs.constants, **constants})
