"""A picture that compares several runs on one cohort: the cases that all of them predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.data.layouts.split import Split, read_split
from trifuse.architectures.evaluation.model_overlays import collect_model_tiles, draw_model_overlays
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.storage.file_names import real_path
from trifuse.kernels import DataError

from .folder import PREDICTIONS_FOLDER, SPLIT_FILE, run_section
from .recipes import DataRecipe

PARTS = ("test", "val", "train")  # what a run predicts of its split: the first of these that has cases


def compare_overlay(runs: Sequence[Path], out: Path, *, limit: int = 6, slice_index: int | None = None) -> Picture:
    """Draw image, truth and the prediction of every run into ``out/model_overlays.png``, one row per case.

    Shown are cases that all runs were to predict; what one of them lacks is shown as missing.

    Args:
        runs: folders of two or more runs on one cohort.
        out: folder to write into.
        limit: how many cases to show at most, see `collect_tiles`.
        slice_index: the slice to show, counted from 0; None takes, of those that show most classes, the one
            with the largest true area.

    Raises:
        DataError: the runs are of different cohorts or classes, or have no case in common.
        CheckpointError: a folder holds no run.
    """
    cohorts = [run_section(run, "data", DataRecipe).open() for run in runs]
    cohort = cohorts[0]
    for run, other in zip(runs, cohorts, strict=True):
        check_same_cohort(run, other, cohort)
    splits = [read_split(run / SPLIT_FILE, cohort) for run in runs]
    part = next((part for part in PARTS if getattr(splits[0], part)), PARTS[-1])
    cases = _common(splits, part)
    if not cases:
        raise DataError(runs[-1], f"{part} cases", got="none in common", want=f"some of those of {runs[0]}")
    predictions = {name: run / PREDICTIONS_FOLDER / part for name, run in zip(names_of(runs), runs, strict=True)}
    rows = collect_model_tiles(predictions, cohort, cases, limit=limit, slice_index=slice_index)
    return draw_model_overlays(rows, list(predictions), cohort.class_names, out)


def check_same_cohort(run: Path, cohort: Cohort, first: Cohort) -> None:
    """Refuse a run on another cohort, or with other classes, than the first.

    Raises:
        DataError: saying which.
    """
    if real_path(Path(cohort.root)) != real_path(Path(first.root)):
        raise DataError(run, "cohort", got=cohort.root, want=f"{first.root}, as the first run has")
    if cohort.class_names != first.class_names:
        raise DataError(run, "classes", got=cohort.class_names, want=f"{first.class_names}, as the first run has")


def _common(splits: Sequence[Split], part: str) -> list[str]:
    return [case for case in getattr(splits[0], part) if all(case in getattr(split, part) for split in splits)]


def names_of(runs: Sequence[Path]) -> list[str]:
    """Name each run after its folder; where two have the same name, with as many folders above as tell them apart.

    Raises:
        DataError: two of them are one folder.
    """
    paths = [real_path(run) for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise DataError(runs[0], "runs", got="the same folder twice", want="different ones")
