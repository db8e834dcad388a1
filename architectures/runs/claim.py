"""Who may write into the folder of a run, and what becomes of a run that is replaced.

A run that is overwritten is moved to ``replaced_run/`` in its own folder, so that the folder may as well be a link or a
place where a disk is mounted. There it stays until the new run has trained up to a checkpoint; if the new one fails
before it begins to train, it is moved back. What is moved are the files that a run writes, by their names; of pictures
and pages those that its ``results.json`` names, of label maps those of its cases. What else is there stays where it is.
While files are on the move their folder is called ``replaced_run.moving/``: after a kill they go back.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from trifuse.architectures.storage.atomic_files import TEMPORARY_PREFIX, sync_folder
from trifuse.architectures.storage.config_json import upgraded_json
from trifuse.architectures.storage.epoch_log import START_FILE
from trifuse.architectures.storage.file_names import real_path
from trifuse.architectures.storage.record import DIGEST, read_record
from trifuse.architectures.training.run_folder import (
    LOCK_FILE,
    REPLACED_FOLDER,
    OutputFolderError,
    discard_replaced,
    lock_folder,
    open_run,
)
from trifuse.kernels import CheckpointError

from .folder import RECIPE_FILE, RUN_FILE, SPLIT_FILE, is_main_process
from .recipes import inputs_of
from .results import named_files
from .run_description import describe_recipe

State = Literal["empty", "prepared", "run", "other"]
_EMPTY = r"\.lock|(recipe|split)\.json|cache/[0-9a-f]{40,64}\.(npy|safetensors)"  # it costs nothing to make it again
_MOVING_FOLDER = f"{REPLACED_FOLDER}.moving"
_CHECKPOINT = "last/training_state.json"
_NETWORKS = r"first_pass/(fold_\d+|network)/"
_RUN = (
    r"(run|start|results)\.json|sessions\.jsonl|log\.csv|report\.md|(runs|summary|records|reconstruction)\.csv"
    r"|(train|val|test)\w*_(cases|summary|readouts)\.csv|predictions/(\w+/)?predictions\.json"
    r"|(best|last)(\.new|\.old|\.damaged)?/((config|score|training_state|log)\.json"
    r"|(model|training_state)\.safetensors(\.new)?)"
    r"|crash/step_\d+_rank_\d+\.json|tensorboard/events\.[^/]+"
    r"|mlflow/(run_id|mlflow\.db(-\w+)?)"
)
_TEMPORARY = rf"(.+/)?{re.escape(TEMPORARY_PREFIX)}.+"
_NAMED_BY_A_RUN = re.compile(  # folder of the run, and a file by whose name alone nobody can tell whose it is
    rf"(?P<run>(run_\d+/|{_NETWORKS})*)"
    r"(?P<file>(figures|audit)/.+|(predictions/(\w+/)?|first_pass/labels/)(?P<case>[^/]+)\.nii\.gz)"
)
_OWN = re.compile(rf"(run_\d+/|{_NETWORKS})*({_EMPTY}|{_RUN})|{_TEMPORARY}")
_IN_AN_EMPTY_FOLDER = re.compile(rf"{_EMPTY}|{_TEMPORARY}")
_BEFORE_A_RUN = re.compile(rf"{_EMPTY}|{_TEMPORARY}|first_pass/.+")


@contextmanager
def claim_run_folder(
    out: Path, recipe: Any = None, *, resume: bool = False, overwrite: bool = False, force: bool = False
) -> Iterator[None]:
    """Keep a folder for a run for as long as this context lasts; no other process may write a run there meanwhile.

    Args:
        out: the folder; made if it does not exist.
        recipe: of the run; what it reads must be no part of a run that is replaced. None where it is not known yet.
        resume: whether it may hold a run, which goes on, or what a run had prepared when it was killed.
        overwrite: put the run that is there aside, see above.
        force: go on with what was prepared although the recipe has changed.

    Raises:
        OutputFolderError: the folder is in use, holds a run that is neither to be resumed nor to be replaced, or
            something else.
    """
    if not is_main_process():
        yield
        return
    if resume and overwrite:
        raise OutputFolderError(f"{out}: a run is either resumed or overwritten; pass one of the two")
    remedy = "pass --resume to continue it, or choose another folder (--overwrite replaces it)"
    with _locked(out, None if resume or overwrite else remedy) as state:
        if overwrite:
            _set_aside(out, recipe)
            state = "empty"
        if (out / REPLACED_FOLDER).exists():
            _say(f"the run that is replaced lies in {out / REPLACED_FOLDER} until the new one has a checkpoint")
        try:
            if recipe is not None and state != "run":
                _open_recipe(out, recipe, new=state == "empty", force=force)
            yield
        except BaseException:
            _settle(out)
            _put_back(out)
            raise
        _settle(out)


def check_run_folder(out: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that `claim_run_folder` would refuse; nothing is made or replaced.

    Raises:
        OutputFolderError: see there; or a folder above is a file.
    """
    if not out.exists():
        above = next(folder for folder in out.absolute().parents if folder.exists())
        if not above.is_dir():
            raise OutputFolderError(f"{above} is a file; choose a folder")
        return
    with _locked(out, None if overwrite else "pass --overwrite to replace it, or choose another folder"):
        pass


@contextmanager
def _locked(out: Path, remedy: str | None) -> Iterator[State]:
    """Lock a folder and yield what it holds, once nothing is on the move there.

    Args:
        out: the folder.
        remedy: what to do where it holds a run; None allows that.

    Raises:
        OutputFolderError: as `claim_run_folder` says.
    """
    if out.exists() and not out.is_dir():
        raise OutputFolderError(f"{out} is a file; choose a folder")
    if not (out / _MOVING_FOLDER).exists():
        _refuse_others(out)  # before the lock, which is a file and has no business among those of others
    with lock_folder(out):
        _settle(out)
        state = _refuse_others(out)
        waits = (out / REPLACED_FOLDER).exists()
        if remedy is not None and (waits or state != "empty"):
            what = "holds a run" if state == "run" else "holds what a run had prepared before it was stopped"
            raise OutputFolderError(f"{out} {what}; {remedy}")
        yield state


def _refuse_others(out: Path) -> State:
    """Return what a folder holds if that is ours.

    Raises:
        OutputFolderError: it is not.
    """
    state = _state(out)
    if state == "other":
        raise OutputFolderError(f"{out} is not empty; choose another folder, new or empty: it holds no run of trifuse")
    return state


def _state(out: Path) -> State:
    """Tell what a folder holds; what lies in ``replaced_run/`` does not count."""
    if _holds_a_run(out):
        return "run"
    found = list(_files(out))
    if SPLIT_FILE in found and not {RECIPE_FILE, LOCK_FILE} & set(found):
        return "other"  # somebody's own split
    if all(map(_IN_AN_EMPTY_FOLDER.fullmatch, found)):
        return "empty"
    return "prepared" if all(map(_BEFORE_A_RUN.fullmatch, found)) else "other"


def _holds_a_run(out: Path) -> bool:
    """Tell whether a folder's ``run.json`` is ours; of a damaged one, whether it has our digest."""
    try:
        described = read_record(out / RUN_FILE)
    except FileNotFoundError:
        return False
    except CheckpointError:
        return DIGEST.encode() in (out / RUN_FILE).read_bytes()
    return "repeated" in described or {"recipe", "config"} <= described.keys()


def _files(out: Path) -> Iterator[str]:
    """Yield the names of all files in a folder and below, relative to it, links among them, but for what is aside."""
    for folder, below, files in os.walk(out):
        here = Path(folder)
        if here == out:
            below[:] = [name for name in below if name not in (REPLACED_FOLDER, _MOVING_FOLDER)]
        links = [name for name in below if (here / name).is_symlink()]  # not followed
        for name in (*files, *links):
            yield (here / name).relative_to(out).as_posix()


def _own_files(out: Path) -> list[str]:
    """Return the names of the files in a folder that a run wrote, but for its lock."""
    named, cases = cache(lambda run: named_files(out / run)), cache(lambda run: _cases_of(out / run))

    def is_own(name: str) -> bool:
        found = _NAMED_BY_A_RUN.fullmatch(name)
        if found is None:
            return name != LOCK_FILE and _OWN.fullmatch(name) is not None
        if found["case"] is not None:
            return found["case"] in cases(found["run"])
        return (own := named(found["run"])) is None or found["file"] in own

    return list(filter(is_own, _files(out)))


def _cases_of(run: Path) -> frozenset[str]:
    """Return the names of the cases in a run's split, whose label maps are its own."""
    try:
        return frozenset(case_id for part in read_record(run / SPLIT_FILE).values() for case_id in part)
    except (OSError, CheckpointError, TypeError):
        return frozenset()


def _open_recipe(out: Path, recipe: Any, *, new: bool, force: bool) -> None:
    """Write the recipe that is being prepared, or compare it with the one that what is there was prepared for."""
    if new:
        stale = [name for name in (RECIPE_FILE, SPLIT_FILE) if (out / name).exists()]
        _refuse_inputs(out, recipe, stale)
        _remove(out, stale)  # of another run that did not get beyond them
    upgrade = partial(upgraded_json, type(recipe))
    changed, accept = open_run(
        out, describe_recipe(recipe), resume=True, force=force, upgrade=upgrade, file=RECIPE_FILE
    )
    accept()
    for difference in changed:
        _say(f"what was prepared is gone on with under a changed recipe: {difference}")


def _refuse_inputs(out: Path, recipe: Any, names: Sequence[str]) -> None:
    """Refuse to touch files in a folder that the new run reads.

    Raises:
        OutputFolderError: one of them is an input, or lies in a folder that is.
    """
    root = real_path(out)
    for path in map(real_path, inputs_of(recipe)) if names and recipe is not None else ():
        below = path.relative_to(root).as_posix() if path.is_relative_to(root) else None
        if below is not None and any(below in (".", name) or name.startswith(f"{below}/") for name in names):
            raise OutputFolderError(
                f"{path} is needed by the new run, and is a part of the one in {out} that it would replace; choose "
                "another folder"
            )


def _set_aside(out: Path, recipe: Any) -> None:
    """Move the run in a folder to ``replaced_run/``; where one is there already, what came since has no checkpoint.

    Raises:
        OutputFolderError: a part of the run is in use, or is an input of the new one.
    """
    own = _own_files(out)
    _refuse_inputs(out, recipe, own)
    with ExitStack() as stack:
        for name in own:
            if Path(name).name == LOCK_FILE:  # of repeats, and of networks of the first pass
                stack.enter_context(lock_folder((out / name).parent))
        if (out / REPLACED_FOLDER).exists():
            _remove(out, own)
        elif own:
            try:
                _move(out, out / _MOVING_FOLDER, own)
                os.rename(out / _MOVING_FOLDER, out / REPLACED_FOLDER)
            except BaseException:
                _settle(out)
                raise
            sync_folder(out)


def _settle(out: Path) -> None:
    """Finish what a kill has left: move back what was on the move, and drop what a run with a checkpoint replaced."""
    moving = out / _MOVING_FOLDER
    if moving.exists():
        _move(moving, out, list(_files(moving)))
        shutil.rmtree(moving)  # empty folders
    if any(map(_has_trained, (out, *out.glob("run_*")))):
        discard_replaced(out)


def _has_trained(run: Path) -> bool:
    """Tell whether a run has a checkpoint beyond that of its start."""
    try:
        return read_record(run / _CHECKPOINT)["position"]["step"] > 0
    except (OSError, CheckpointError, KeyError, TypeError):
        return False


def _put_back(out: Path) -> None:
    """Move a run back that was to be replaced, if the new one did not begin to train; else say where it lies."""
    replaced = out / REPLACED_FOLDER
    if not replaced.exists():
        return
    if any(name == START_FILE or name.endswith(f"/{_CHECKPOINT}") for name in _files(out)):  # or of its first pass
        _say(f"the run that was to be replaced lies in {replaced}; pass --resume to go on with the new one")
        return
    _remove(out, _own_files(out))
    os.rename(replaced, out / _MOVING_FOLDER)
    _settle(out)
    _say(f"the run that was to be replaced is back in {out}")


def _move(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(exist_ok=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(source / name, target / name)
    _remove_empty_folders(source, names)


def _remove(out: Path, names: Sequence[str]) -> None:
    for name in names:
        (out / name).unlink()
    _remove_empty_folders(out, names)


def _remove_empty_folders(root: Path, names: Sequence[str]) -> None:
    """Remove the folders that files of these names have left empty."""
    folders = {folder for name in names for folder in (root / name).parents if folder.is_relative_to(root)} - {root}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with suppress(OSError):  # not empty
            folder.rmdir()


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)
