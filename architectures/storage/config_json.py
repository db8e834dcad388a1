"""Configuration dataclasses as JSON, and back with every value checked against the type of its field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from trifuse.kernels.errors import CheckpointError

from .text import nearest

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

    Raises:
        CheckpointError: an unknown field, a value of the wrong type, or one that the dataclass refuses.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: expected the fields of {config_type.__name__}, got {values!r}")
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
    if dataclasses.is_dataclass(hint):
        return config_from_json(typing.cast(type, hint), value, where)
    if origin is typing.Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) == len(value):
            return tuple(_typed(item, kind, where) for item, kind in zip(value, items, strict=True))
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, dict) and (section := dataclass_of(hint)) is not None:
            return _typed(value, section, where)  # and say what is wrong in it
        for option in arguments:
            try:
                return _typed(value, option, where)
            except CheckpointError:
                continue
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is hint:
        return value
    raise CheckpointError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def dataclass_of(hint: Any) -> type | None:
    """Return the dataclass that a field's type is, or may be; None if it cannot be one."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def nearest_note(name: str, known: Sequence[str]) -> str:
    """Say which known name a key may have meant; empty if none is much like it."""
    near = nearest(name, known, cutoff=0.8)
    return f"  (nearest: {near})" if near else ""
