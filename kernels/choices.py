"""The one check for values that must be one of a few: an argument of a function, or the fields of a configuration.

The choices stand in a ``Literal`` that the argument or the field is annotated with, or are the keys of a table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_choice(what: str, value: object, choices: Any, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` unless ``value`` is one of ``choices``.

    Args:
        what: what the value is, for the message: ``"norm"``, or ``"ContextAwareFusion: spatial_pool"``.
        value: what was given.
        choices: a ``Literal``, with or without ``| None``, or an iterable of the values.
        error: the type of the error.
    """
    problem = choice_problem(what, value, choices)
    if problem:
        raise error(problem)


def check_choices(config: Any) -> None:
    """Check every field of a dataclass that is annotated with a ``Literal``, with or without ``| None``.

    Raises:
        ValueError: one line per field that holds none of its choices.
    """
    problems = choice_problems(config)
    if problems:
        raise ValueError("\n".join(problems))


def choice_problems(config: Any) -> list[str]:
    """Return the message of each ``Literal`` field of a dataclass that holds none of its choices."""
    kind: Any = type(config)
    allowed = _choices_of_fields(kind)
    messages = [choice_problem(name, getattr(config, name), choices) for name, choices in allowed.items()]
    return [message for message in messages if message]


def choice_problem(what: str, value: object, choices: Any) -> str:
    """Return what is wrong with a value that is none of the choices; empty if it is one."""
    allowed = choices if isinstance(choices, tuple) else choices_of(choices) or tuple(choices)
    for choice in allowed:  # an equal value of another type, such as True for 1, is none of them
        if value == choice and isinstance(value, type(choice)) and not isinstance(value, bool):
            return ""
    near = nearest(value, [choice for choice in allowed if isinstance(choice, str)]) if isinstance(value, str) else None
    advice = f"; did you mean {near!r}?" if near else ""
    return f"{what}: expected one of {', '.join(map(repr, allowed))}, got {value!r}{advice}"


def choices_of(hint: Any) -> tuple[Any, ...] | None:
    """Return the values of a ``Literal``, and None last for one that is ``| None``; None for any other type."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = [part for part in parts if get_origin(part) is Literal]
    if not literals or any(part is not NoneType for part in parts if part not in literals):
        return None
    return (*(value for part in literals for value in get_args(part)), *([None] if NoneType in parts else []))


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known word that is spelt most like ``word``; None where none is at least ``cutoff`` like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


@cache
def _choices_of_fields(kind: type) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(kind)
    found = {field.name: choices_of(hints[field.name]) for field in fields(kind)}
    return {name: choices for name, choices in found.items() if choices is not None}
