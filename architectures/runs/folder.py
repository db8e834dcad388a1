"""The folder of a run: what its files are called, and what it says of itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trifuse.architectures.storage.config_json import config_from_json
from trifuse.architectures.storage.file_names import real_path
from trifuse.architectures.storage.record import read_record
from trifuse.kernels import CheckpointError, DataError

RUN_FILE = "run.json"  # written by `fit` when training begins
RECIPE_FILE = "recipe.json"  # as it was given; written first, and compared where there is no run.json yet
SPLIT_FILE = "split.json"
LOG_FILE = "log.csv"
BEST_FOLDER = "best"  # the network of the best epoch
CACHE_FOLDER = "cache"
FIRST_PASS_FOLDER = "first_pass"  # networks that a run needs before its own, each a run
PREDICTIONS_FOLDER = "predictions"  # with one folder for each part of the split that was predicted
FIGURES_FOLDER = "figures"


def is_main_process() -> bool:
    """Tell whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def run_of(folder: Path) -> Path | None:
    """Return the run that a folder is, or that it lies in, as ``best`` and ``last.old`` do; None if there is none."""
    for run in (folder, folder.parent, real_path(folder).parent):
        if (run / RUN_FILE).exists():
            return run
    return None


def epochs_of(run: Path) -> int | None:
    """Return how many epochs a run was to train when it was last begun; None where there is none that says so."""
    try:
        description = read_record(run / RUN_FILE)
        training = description["repeated"]["training"] if "repeated" in description else description["recipe"]
        return int(training["epochs"])
    except (OSError, CheckpointError, KeyError, TypeError, ValueError):  # said where the run is opened
        return None


def validates(run: Path) -> bool:
    """Whether cases validated in a run; who cannot know that assumes so.

    Raises:
        DataError: its split is none.
    """
    split = run / SPLIT_FILE
    try:
        return bool(read_record(split)["val"])
    except FileNotFoundError:
        return True
    except (KeyError, TypeError) as error:
        raise DataError(split, "split", got=error, want='a split, with "val"') from error


def network_folder(folder: Path) -> Path:
    """Return where the network of a run lies, or the folder itself where that is no run's."""
    return folder / BEST_FOLDER if run_of(folder) == folder else folder


def run_section(run: Path, section: str, kind: type) -> Any:
    """Return a section of what a run's ``run.json`` says about it, such as its ``"data"``, as the dataclass it was.

    Raises:
        CheckpointError: there is no run, it was not written by trifuse, is damaged, or lacks the section.
    """
    path = run / RUN_FILE
    try:
        values = read_record(path)["config"][section]
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected the description of a run of trifuse, found {error!r}") from error
    return config_from_json(kind, values, path)
