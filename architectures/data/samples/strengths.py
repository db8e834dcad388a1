"""What each strength of an augmentation may be; `augmentation_recipe` says what it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

Range = tuple[float, float]


def check_strengths(strengths: Any) -> None:
    """Refuse strengths that make no sense.

    Args:
        strengths: a dataclass with some of the fields of an `AugmentationRecipe`; None is left alone.

    Raises:
        ValueError: one line for each field that is out of range.
    """
    problems = []
    for field in fields(strengths):
        value = getattr(strengths, field.name)
        allowed, holds = _PROBABILITY if field.name.endswith("_probability") else _ALLOWED[field.name]
        if value is not None and not holds(value):
            problems.append(f"augmentation.{field.name}: expected {allowed}, got {value!r}")
    if problems:
        raise ValueError("\n".join(problems))


def _is_within(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _is_range(value: Any, low: float, high: float = math.inf, *, open_below: bool = False) -> bool:
    """Tell whether a value is a lowest and a highest number, finite and within limits."""
    if not (isinstance(value, tuple) and len(value) == 2 and all(_is_within(end, low, high) for end in value)):
        return False
    return value[0] <= value[1] < math.inf and not (open_below and value[0] == low)


_PROBABILITY = ("a probability in [0, 1]", lambda value: _is_within(value, 0, 1))
_POSITIVE = ("a lowest and a highest number above 0", lambda value: _is_range(value, 0, open_below=True))
_NOT_NEGATIVE = ("a lowest and a highest number, neither below 0", lambda value: _is_range(value, 0))

# Every field but the probabilities.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "right_angles": ("true or false", lambda value: isinstance(value, bool)),
    "mirror_axes": ("[], [0], [1] or [0, 1]", lambda value: value in ((), (0,), (1,), (0, 1))),
    "rotation_degrees": ("an angle in [0, 180]", lambda value: _is_within(value, 0, 180)),
    "rotate_image_order": ("a whole number from 0 to 5", lambda value: type(value) is int and 0 <= value <= 5),
    "scale_range": _POSITIVE,
    "shift_limit": ("a part of the side, in [0, 1]", lambda value: _is_within(value, 0, 1)),
    "noise_variance": _NOT_NEGATIVE,
    "blur_sigma_px": _POSITIVE,
    "brightness_range": _NOT_NEGATIVE,
    "contrast_range": _NOT_NEGATIVE,
    "low_resolution_range": (
        "a lowest and a highest part of the pixels, in (0, 1]",
        lambda value: _is_range(value, 0, 1, open_below=True),
    ),
    "gamma_range": _POSITIVE,
}
