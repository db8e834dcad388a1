"""The folder of a run: what its files are called, and who may write into it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from trifuse.architectures.storage.config_json import config_from_json
from trifuse.architectures.storage.text import read_parsed
from trifuse.architectures.training.run_folder import LOCK_FILE, OutputFolderError
from trifuse.kernels import CheckpointError

RUN_FILE = "run.json"  # written by `fit` when training begins
SPLIT_FILE = "split.json"
LOG_FILE = "log.csv"
BEST_FOLDER = "best"  # the network of the best epoch
CACHE_FOLDER = "cache"
FIRST_PASS_FOLDER = "first_pass"  # networks that a run needs before its own, each a run
PREDICTIONS_FOLDER = "predictions"  # with one folder for each part of the split that was predicted
FIGURES_FOLDER = "figures"
_BEFORE_A_RUN = {SPLIT_FILE, CACHE_FOLDER, FIRST_PASS_FOLDER, LOCK_FILE}  # all that a run writes before its run.json


def is_main_process() -> bool:
    """Tell whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def claim_run_folder(out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder that holds anything, unless the run in it is to be resumed or may be overwritten.

    Raises:
        OutputFolderError: the folder is in use, or holds what trifuse did not write.
    """
    if not is_main_process():
        return
    if out.exists() and not out.is_dir():
        raise OutputFolderError(f"{out} is a file; choose a folder")
    out.mkdir(parents=True, exist_ok=True)
    began = (out / RUN_FILE).exists()
    first_pass = not began and _stopped_in_its_first_pass(out)
    if not any(out.iterdir()) or (resume and (began or first_pass)):
        return
    ours = began or first_pass or _failed_before_it_began(out)
    if not overwrite:
        hint = "pass --resume to continue it, --overwrite to start again" if began or first_pass else ""
        if ours and not hint:
            hint = "a run failed there before it began; pass --overwrite to start again"
        hint = f"{hint}, or choose another folder" if hint else "choose another folder, new or empty"
        raise OutputFolderError(f"{out} is not empty; {hint}")
    if not ours:
        raise OutputFolderError(f"{out} is not empty and holds no run of trifuse; remove it by hand, if that is meant")
    shutil.rmtree(out)
    out.mkdir()


def _stopped_in_its_first_pass(out: Path) -> bool:
    """Tell whether a folder holds runs of a first pass, and nothing else but what comes before a ``run.json``."""
    ours = {path.name for path in out.iterdir()} <= _BEFORE_A_RUN
    return ours and any((out / FIRST_PASS_FOLDER).glob(f"*/{SPLIT_FILE}"))


def _failed_before_it_began(out: Path) -> bool:
    """Tell whether a folder holds our cache, and nothing else but what a run writes before its ``run.json``."""
    cached = list((out / CACHE_FOLDER).glob("*"))
    ours = {path.name for path in out.iterdir()} <= _BEFORE_A_RUN
    return ours and bool(cached) and all(path.suffix == ".npy" for path in cached)


def run_of(folder: Path) -> Path | None:
    """Return the run that a folder is, or whose folder ``best`` it is; None for a network without a run."""
    for run in (folder, folder.parent if folder.name == BEST_FOLDER else folder):
        if (run / RUN_FILE).exists():
            return run
    return None


def network_folder(folder: Path) -> Path:
    """Return where the network of a run lies, or the folder itself where that is no run's."""
    return folder / BEST_FOLDER if run_of(folder) == folder else folder


def run_section(run: Path, section: str, kind: type) -> Any:
    """Return a section of what a run's ``run.json`` says about it, such as its ``"data"``, as the dataclass it was.

    Raises:
        CheckpointError: there is no run, it was not written by trifuse, or it lacks the section.
    """
    path = run / RUN_FILE
    try:
        values = read_parsed(path, json.loads)["config"][section]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected the description of a run of trifuse, found {error!r}") from error
    return config_from_json(kind, values, path)
