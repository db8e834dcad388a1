"""Configuration dataclasses as JSON, and back with every value checked against the type of its field.

A dataclass may say how older files spelled it. ``RENAMED`` maps an old dotted field name to its dotted name of today,
both relative to the dataclass; a section that is renamed takes its fields along. A static method
``upgraded(values) -> values`` replaces values whose meaning is spelled in another way now. Both are honoured wherever
values are read: from saved files, from a recipe's TOML file, and from ``--set``.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trifuse.kernels.choices import check_choice, choices_of, nearest
from trifuse.kernels.errors import CheckpointError

SCHEMA_VERSION = 1


def config_to_json(config: Any) -> dict[str, Any]:
    """Turn a configuration dataclass into JSON values; fields with ``metadata={"saved": False}`` are left out."""
    return {
        field.name: config_to_json(value) if dataclasses.is_dataclass(value) else _plain(value)
        for field in dataclasses.fields(config)
        if field.metadata.get("saved", True)
        for value in [getattr(config, field.name)]
    }


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def config_from_json(config_type: type, values: Any, source: object) -> Any:
    """Build a configuration dataclass from JSON values, every one of them checked against the field's type.

    Names and spellings of older versions are understood, see `upgraded_json`.

    Raises:
        CheckpointError: an unknown field, a value of the wrong type, or one that the dataclass refuses.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: expected the fields of {config_type.__name__}, got {values!r}")
    return _built(config_type, upgraded_json(config_type, values), source)


def _built(config_type: type, values: dict[str, Any], source: object) -> Any:
    """Build a dataclass from values that are spelled as today."""
    hints = typing.get_type_hints(config_type)
    known = [field.name for field in dataclasses.fields(config_type)]
    for name in values:
        if name not in known:
            raise CheckpointError(
                f"{source}: unknown field {name!r} of {config_type.__name__}{nearest_note(name, known)}; this trifuse "
                f"reads schema version {SCHEMA_VERSION}: was the file written by a newer one?"
            )
    arguments = {name: _typed(value, hints[name], f"{source}: field {name!r}") for name, value in values.items()}
    try:
        return config_type(**arguments)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as the type that ``hint`` asks for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:  # JSON of another package's, which checks it itself
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: expected the fields of {typing.cast(type, hint).__name__}, got {value!r}")
        return _built(typing.cast(type, hint), value, where)
    if (choices := choices_of(hint)) is not None:
        check_choice(where, value, choices, CheckpointError)
        return value
    if origin is tuple and isinstance(value, list):
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) == len(value):
            return tuple(_typed(item, kind, where) for item, kind in zip(value, items, strict=True))
    if origin is dict and isinstance(value, dict):
        return {name: _typed(item, arguments[1], f"{where}, {name!r}") for name, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, dict) and (section := dataclass_of(hint)) is not None:
            return _typed(value, section, where)  # and say what is wrong in it
        for option in arguments:
            try:
                return _typed(value, option, where)
            except CheckpointError:
                continue
    if type(value) is int and hint in (int, float) and not -(2**63) <= value < 2**63:
        raise CheckpointError(f"{where}: expected a number that 64 bits hold, got one of {value.bit_length()} bits")
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):  # which JSON has no word for
        raise CheckpointError(f"{where}: expected {_described(hint)}, got {value}")
    if origin is None and type(value) is hint:
        return value
    raise CheckpointError(f"{where}: expected {_described(hint)}, got {value!r}")


def _described(hint: Any) -> str:
    """Say in words which JSON values a type stands for."""
    if (choices := choices_of(hint)) is not None:
        return " or ".join(map(repr, choices))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if hint is float:
        return "a finite number"
    if origin is tuple:
        items = arguments[:1] if arguments[-1] is Ellipsis else arguments
        return f"a list of {', '.join(map(_described, items))}"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def upgraded_json(config_type: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a configuration, its sections included, in the names and spellings of today.

    Nothing is checked: fields that the dataclass does not know stay as they are. Where a file has both the old and the
    new name of a field, the new one counts.

    Args:
        config_type: the dataclass, which may declare ``RENAMED`` and ``upgraded``.
        values: as an older version, or this one, wrote them.
    """
    current = dict(values)
    for old, new in _renamed_fields(config_type).items():
        _move(current, old.split("."), new.split("."))
    current = getattr(config_type, "upgraded", dict)(current)
    hints = typing.get_type_hints(config_type)
    for name, value in current.items():
        section = dataclass_of(hints.get(name))
        if section is not None and isinstance(value, dict):
            current[name] = upgraded_json(section, value)
    return current


def current_name(config_type: type, dotted: str) -> str:
    """Return today's dotted name of a field that is given by that, or by the dotted name of an older version."""
    for old, new in _renamed_fields(config_type).items():
        if dotted == old or dotted.startswith(f"{old}."):
            dotted = new + dotted.removeprefix(old)
            break
    name, dot, rest = dotted.partition(".")
    section = dataclass_of(typing.get_type_hints(config_type).get(name))
    return dotted if section is None or not dot else f"{name}.{current_name(section, rest)}"


def _renamed_fields(config_type: type) -> Mapping[str, str]:
    return getattr(config_type, "RENAMED", {})


def _move(values: dict[str, Any], old: Sequence[str], new: Sequence[str]) -> None:
    """Move an entry of nested dictionaries, which are copied before they change; what is there already wins."""
    section: Any = values
    for name in old[:-1]:
        if not isinstance(section.get(name), dict):
            return
        section[name] = section = dict(section[name])
    if old[-1] not in section:
        return
    value, section = section.pop(old[-1]), values
    for name in new[:-1]:
        section[name] = section = dict(section.get(name) or {})
    there = section.setdefault(new[-1], value)
    if isinstance(value, dict) and isinstance(there, dict):
        section[new[-1]] = {**value, **there}


def dataclass_of(hint: Any) -> type | None:
    """Return the dataclass that a field's type is, or may be; None if it cannot be one."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def nearest_note(name: str, known: Sequence[str]) -> str:
    """Say which known name a key may have meant; empty if none is much like it."""
    near = nearest(name, known, cutoff=0.8)
    return f"  (nearest: {near})" if near else ""


def leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name of every JSON value that is no section, and the value."""
    if isinstance(values, dict) and values:
        for key, part in values.items():
            yield from leaves(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, values
