"""The checks of numbers among an operator's arguments, which PyTorch refuses in words of its own, or takes on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .errors import ShapeError


def check_number(what: str, value: object) -> None:
    """Refuse None and tensors where a number is compiled into the code, or handed to it.

    Raises:
        TypeError: saying what to pass.
    """
    if value is None or isinstance(value, Tensor):
        kind = "None" if value is None else f"a tensor of shape {tuple(value.shape)}"
        raise TypeError(f"{what}: expected a number, got {kind}; pass a float, such as tensor.item()")


def check_whole(what: str, values: Iterable[object]) -> None:
    """Refuse fractions, and floats that are none, where positions are counted.

    Raises:
        TypeError: saying what to pass.
    """
    for value in values:
        if isinstance(value, float):
            raise TypeError(f"{what}: expected whole numbers, got {value}; pass int({value})")


def check_listed(what: str, value: object) -> None:
    """Refuse one number where a sequence of them is asked for.

    Raises:
        ShapeError: saying what to pass.
    """
    if isinstance(value, int | float):
        raise ShapeError(f"{what}: expected a sequence of whole numbers, got {value}; pass ({value},)")
