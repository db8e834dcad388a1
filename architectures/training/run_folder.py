"""The output folder: one run, written by one process at a time, with one configuration."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trifuse.architectures.storage.atomic_files import remove_leftovers, write_json
from trifuse.architectures.storage.text import read_parsed
from trifuse.kernels.errors import TrifuseError

LOCK_FILE = ".lock"
_RUN_FILE = "run.json"
_SESSIONS_FILE = "sessions.jsonl"
_ABSENT = "(absent)"


class OutputFolderError(TrifuseError):
    """The output folder cannot be used as asked: it holds another run, or another process is writing to it."""


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Make the folder if it does not exist, lock it for this process, and remove temporary files of a killed one.

    The lock belongs to the process and not to the file's existence: a killed run leaves nothing that must be removed.

    Raises:
        OutputFolderError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK_FILE, "a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise OutputFolderError(
                f"{out} is in use by process {lock.read().strip() or 'unknown'}; wait for it, or choose another folder"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        remove_leftovers(out)
        yield


def open_run(
    out: Path,
    description: Mapping[str, Any],
    *,
    resume: bool,
    force: bool,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> list[str]:
    """Write ``run.json`` for a new run, or compare it for one that is resumed.

    Args:
        out: the output folder.
        description: all that decides the result, as JSON values.
        resume: whether the folder may hold a run; a folder without one starts a new run either way.
        force: resume, accept a changed description, and replace it.
        upgrade: turns a description that an older version wrote into today's names and spellings.

    Returns:
        One line per accepted difference.

    Raises:
        OutputFolderError: the folder holds a run that is not to be resumed, or another description.
    """
    path = out / _RUN_FILE
    new = json.loads(json.dumps(description))
    if not path.exists():
        write_json(path, new)
        return []
    if not (resume or force):
        raise OutputFolderError(f"{out} already holds a run; resume it, or choose another folder")
    try:
        old = upgrade(dict(read_parsed(path, json.loads)))
    except (ValueError, TypeError) as error:
        raise OutputFolderError(f"{path}: expected the description of a run of trifuse, got {error}") from error
    if "repeated" in {*old} ^ {*new}:
        kinds = ("repeated runs", "a single run") if "repeated" in old else ("a single run", "repeated runs")
        raise OutputFolderError(f"{out} holds {kinds[0]}, and cannot hold {kinds[1]} as well; choose another folder")
    differences = _differences(old, new)
    if differences and not force:
        raise OutputFolderError(
            f"{out} was started with another configuration:\n  "
            + "\n  ".join(differences)
            + "\nresume with the old values, force the new ones (--force-resume), or choose another folder"
        )
    if differences:
        write_json(path, new)
    return differences


def append_session(out: Path, **facts: Any) -> None:
    """Append a line of JSON to ``sessions.jsonl``: when, where and by which versions the run was started or resumed."""
    versions = {name: version(name) for name in ("trifuse", "torch")}
    with open(out / _SESSIONS_FILE, "a") as stream:
        stream.write(
            json.dumps({"started": datetime.now(UTC).isoformat(timespec="seconds"), **versions, **facts}) + "\n"
        )


def _differences(old: Any, new: Any) -> list[str]:
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{name}: {before.get(name, _ABSENT)!r} -> {after.get(name, _ABSENT)!r}"
        for name in before | after
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
