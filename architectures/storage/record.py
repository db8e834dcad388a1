"""JSON files that carry a digest of their own content, so that damage is named and not believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trifuse.kernels.errors import CheckpointError

from .atomic_files import describe_content, write_json
from .text import parse_json, read_parsed

DIGEST = "content_sha256"


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON values by name, and their digest, atomically."""
    write_json(path, {**values, DIGEST: digest_of(values)})


def read_record(path: Path) -> dict[str, Any]:
    """Return what `write_record` wrote, without the digest; what an older version wrote has none, and is believed.

    Raises:
        OSError: there is no such file, or it cannot be read.
        CheckpointError: the file is damaged.
    """
    values, damage = look_at_record(path)
    if damage is not None:
        raise damage
    return values


def look_at_record(path: Path) -> tuple[dict[str, Any], CheckpointError | None]:
    """Return what `read_record` does, and what that raises if the digest is of something else.

    So who reads it can say first what else is wrong.

    Raises:
        OSError: there is no such file, or it cannot be read.
        CheckpointError: it is no JSON, or no values by name.
    """
    try:
        values = read_parsed(path, parse_json)
    except ValueError as error:
        found = describe_content(path)
        raise CheckpointError(f"{path}: expected JSON, found {found} ({error}); the file is damaged") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected JSON values by name, found {type(values).__name__}")
    return values, take_digest(path, values)


def take_digest(path: Path, values: dict[str, Any]) -> CheckpointError | None:
    """Remove the digest from the values of a file, and return what is wrong if it is of something else."""
    digest = values.pop(DIGEST, None)
    if digest is None or digest == (found := digest_of(values)):
        return None
    return CheckpointError(
        f"{path}: the content has changed since it was written: expected SHA-256 {digest}, got {found}; restore the "
        f"file, or remove {DIGEST!r} from it if it was edited on purpose"
    )


def digest_of(values: Any) -> str:
    """Return the hexadecimal SHA-256 of JSON values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
