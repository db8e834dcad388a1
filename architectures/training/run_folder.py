"""The output folder: one run, written by one process at a time, with one configuration."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from trifuse.architectures.storage.atomic_files import remove_leftovers
from trifuse.architectures.storage.config_json import leaves, upgraded_json
from trifuse.architectures.storage.file_names import real_path
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.architectures.storage.text import read_text
from trifuse.kernels.errors import CheckpointError, TrifuseError

from .recipe import Recipe

LOCK_FILE = ".lock"
REPLACED_FOLDER = "replaced_run"  # of an output folder: the run that its run is to replace, until that has a checkpoint
DIGESTS = "digests"  # in the configuration of a run: of its samples' files, by name
_RUN_FILE = "run.json"
_SESSIONS_FILE = "sessions.jsonl"
_ABSENT = "(absent)"
_DIFFERENCES_SHOWN = 10
_EPOCHS = ("recipe.epochs", "repeated.training.epochs")  # of a run, and of repeated ones
_held: set[tuple[int, Path]] = set()  # folders that are locked, with the process: a fork has none of its parent's locks


class OutputFolderError(TrifuseError):
    """The output folder cannot be used as asked: it holds another run, or another process is writing to it."""


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Make the folder if it does not exist, lock it for this process, and remove temporary files of a killed one.

    The lock belongs to the process and not to the file's existence: a killed run leaves nothing that must be removed.
    A process may lock a folder again that it has locked. Where the file system has no locks, processes of this machine
    are still kept apart where that has any, by a file in its folder of temporary files, and a line says so.

    Raises:
        OutputFolderError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    held = os.getpid(), real_path(out)
    if held in _held:  # a second handle on the file would lose the lock when it is closed
        yield
        return
    with open(out / LOCK_FILE, "a+") as lock, ExitStack() as stack:
        try:
            _take(lock)
        except BlockingIOError as error:
            lock.seek(0)
            raise OutputFolderError(
                f"{out} is in use by process {lock.read().strip() or 'unknown'}; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            print(
                f"note: {out}: this file system has no locks ({error.strerror}); let nobody else write there",
                file=sys.stderr,
            )
            try:
                _take(stack.enter_context(open(_substitute_for(out), "a+")))
            except BlockingIOError:
                raise OutputFolderError(f"{out} is in use by another process; wait for it, or choose another") from None
            except OSError:  # nor has this machine any
                pass
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {platform.node()}\n")
        lock.flush()
        remove_leftovers(out, below=True)
        _held.add(held)
        try:
            yield
        finally:
            _held.remove(held)


def _take(lock: IO[str]) -> None:
    """Lock a file for this process.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file system, or the operating system, knows no locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(errno.ENOLCK, "not on this operating system") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, error.strerror) from error
        raise


def _substitute_for(out: Path) -> Path:
    """Return the file of this machine that stands for a folder whose file system has no locks."""
    return Path(tempfile.gettempdir()) / f"trifuse-{hashlib.sha256(os.fsencode(real_path(out))).hexdigest()}.lock"


def discard_replaced(out: Path) -> None:
    """Remove the run that a run has replaced: now that it has a checkpoint, it is the run in its folder."""
    shutil.rmtree(out / REPLACED_FOLDER, ignore_errors=True)


def open_run(
    out: Path,
    description: Mapping[str, Any],
    *,
    resume: bool,
    force: bool,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    file: str = _RUN_FILE,
) -> tuple[list[str], Callable[[], None]]:
    """Write ``run.json`` for a new run, or compare it for one that is resumed.

    Args:
        out: the output folder.
        description: all that decides the result, as JSON values.
        resume: whether the folder may hold a run, which may be trained longer; a folder without one starts a new run
            either way.
        force: resume, and accept a changed description.
        upgrade: turns a description that an older version wrote into today's names and spellings.
        file: another one than ``run.json``.

    Returns:
        One line per accepted difference; and what writes the description that was accepted, once, to be called with the
        first checkpoint that is made under it: a run that fails before remains what it was.

    Raises:
        OutputFolderError: the folder holds a run that is not to be resumed, or another description.
        CheckpointError: its description is damaged.
    """
    path = out / file
    new = json.loads(json.dumps(description))
    if not path.exists():
        write_record(path, new)
        return [], lambda: None
    if not (resume or force):
        raise OutputFolderError(f"{out} already holds a run; resume it, or choose another folder")
    try:
        written = read_record(path)
    except CheckpointError as error:
        if force:
            return [f"{path.name} is damaged, and written anew"], cache(lambda: write_record(path, new))
        raise CheckpointError(f"{error}; --force-resume takes the recipe that is given for that of the run") from error
    old = upgrade(written)
    if "repeated" in {*old} ^ {*new}:
        kinds = ("repeated runs", "a single run") if "repeated" in old else ("a single run", "repeated runs")
        raise OutputFolderError(f"{out} holds {kinds[0]}, and cannot hold {kinds[1]} as well; choose another folder")
    differences = _differences(old, new)
    if differences and not force and not _is_longer_alone(old, new):
        shown = [*differences[:_DIFFERENCES_SHOWN], *_rest(differences)]
        raise OutputFolderError(
            f"{out} was started with another configuration:\n  "
            + "\n  ".join(shown)
            + "\nresume with the old values, force the new ones (--force-resume), or choose another folder"
        )
    return differences, cache(lambda: None if written == new else write_record(path, new))


def upgraded_description(
    config_type: type | None, run_config: Mapping[str, Any], description: dict[str, Any]
) -> dict[str, Any]:
    """Return the description of an older run in the names and spellings of today; without digests, it gets ours."""
    if not all(isinstance(description.get(part), dict) for part in ("config", "recipe")):
        return description  # which is none of ours, and differs in everything
    ours = {DIGESTS: run_config[DIGESTS]} if DIGESTS in run_config else {}
    config = {**ours, **description["config"], "training": description["recipe"]}
    if config_type is not None:
        config = upgraded_json(config_type, config)
    config = with_same_data(config, run_config) if DIGESTS in description["config"] else config
    recipe = upgraded_json(Recipe, config.pop("training"))
    return {**description, "recipe": recipe, "config": config}


def with_same_data(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration with the paths of a new one if the digests say that its data lie there by now."""
    before, after = old.get("data"), new.get("data")
    if not before or not after or not new.get(DIGESTS) or old.get(DIGESTS) != new[DIGESTS]:
        return old
    moved = {name: after[name] for name in ("root", "split") if before.get(name) and after.get(name)}
    return {**old, "data": {**before, **moved}}


def _is_longer_alone(old: Any, new: Any) -> bool:
    """Tell whether two descriptions differ in nothing but more epochs."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return all(
        name in _EPOCHS and type(before.get(name)) is int and before[name] < after.get(name, 0)
        for name in before | after
        if not _agree(before.get(name, _ABSENT), after.get(name, _ABSENT))
    )


def _rest(differences: Sequence[str]) -> list[str]:
    left = len(differences) - _DIFFERENCES_SHOWN
    return [f"and {left} more"] if left > 0 else []


def append_session(out: Path, **facts: Any) -> None:
    """Append a line of JSON to ``sessions.jsonl``: when, where and by which versions the run was started or resumed."""
    versions = {name: version(name) for name in ("trifuse", "torch")}
    _append(out, {"started": _now(), **versions, **facts})


def read_sessions(out: Path) -> list[dict[str, Any]]:
    """Return what `append_session` noted, oldest first, but for lines that a kill or a full disk has cut short."""
    path, sessions = out / _SESSIONS_FILE, []
    for line in read_text(path, errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            facts = json.loads(line)
            sessions += [facts] if "steps_done" in facts else []
    return sessions


def append_note(out: Path, **facts: Any) -> None:
    """Append a line of JSON to ``sessions.jsonl`` on what happened since the run was started or resumed.

    On a full disk the note is lost; the run is not.
    """
    with suppress(OSError):
        _append(out, {"time": _now(), **facts})


def _append(out: Path, facts: Mapping[str, Any]) -> None:
    with open(out / _SESSIONS_FILE, "a") as stream:
        stream.write(json.dumps(facts) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _differences(old: Any, new: Any) -> list[str]:
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        f"{name}: {before.get(name, _ABSENT)!r} -> {after.get(name, _ABSENT)!r}"
        for name in before | after
        if not _agree(before.get(name, _ABSENT), after.get(name, _ABSENT))
    ]


def _agree(old: Any, new: Any) -> bool:
    """Tell whether two values are equal, or paths to the same file or folder, however they are written."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return all(map(_agree, old, new))
    if old != new and isinstance(old, str) and isinstance(new, str) and old and new:
        try:
            return os.path.samefile(old, new)
        except (OSError, ValueError):
            return False
    return bool(old == new)
