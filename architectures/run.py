"""One run: a study in; a trained network, predictions, scores and a report out. Networks' ``train.py`` use it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .data.augmentation import FlipRotate, TransUNetAugmentation
from .data.cases import Study
from .data.slices import Augment, Keep, SliceDataset
from .data.split import Split, read_split, write_split
from .evaluation.charts import draw_training_curves
from .evaluation.metrics import Conventions
from .evaluation.overlays import collect_tiles, draw_overlays
from .evaluation.picture import Picture
from .evaluation.predict import predict_cases
from .evaluation.report import (
    Evaluation,
    PaperTable,
    check_extras,
    describe_data,
    describe_environment,
    describe_network,
    format_seconds,
    write_report,
)
from .evaluation.scoring import evaluate_cases
from .recipes import DataRecipe
from .run_log import read_log
from .training.run_folder import LOCK_FILE, OutputFolderError

Part = Literal["train", "val", "test"]
SPLIT_FILE = "split.json"
_CACHE_FOLDER = "cache"
_BEFORE_A_RUN = {SPLIT_FILE, _CACHE_FOLDER, LOCK_FILE}  # all that a run writes before its run.json
_AUGMENTATIONS: dict[str, Callable[[], Augment] | None] = {
    "none": None,
    "flip_rot": FlipRotate,
    "transunet": TransUNetAugmentation,
}
_PART_TITLES = {"train": "Training cases", "val": "Validation cases", "test": "Test cases"}


@dataclass(frozen=True)
class PreparedData:
    """A study, its split, and the slices of the cases that train and validate."""

    study: Study
    split: Split
    train_set: SliceDataset
    val_set: SliceDataset

    @property
    def validated_on(self) -> Part:
        """Where the best epoch is chosen: on the validation cases, or on the training cases where there are none."""
        return "val" if self.split.val else "train"

    def cases_of(self, part: Part) -> tuple[str, ...]:
        """Return the case ids of a part of the split."""
        return getattr(self.split, part)


def prepare_data(recipe: DataRecipe, out: Path, *, cache: Path | None = None) -> PreparedData:
    """Open the study, split it, write the split into the run's folder, and prepare the slices.

    What the report will need is looked for as well: a missing package is found before work starts, not after.

    A split that lies in ``out`` already, from the run that is resumed, is used as it is.

    Raises:
        DataError: everything that is wrong with the cases, at once.
        MissingExtra: scipy or matplotlib is not installed.
    """
    check_extras()
    study = recipe.open()
    written = out / SPLIT_FILE
    split = read_split(written, study) if written.exists() else recipe.choose_split(study)
    cache = cache or out / _CACHE_FOLDER
    options: dict[str, Any] = {
        "image_size": recipe.image_size,
        "cache": cache,
        "nonfinite": recipe.nonfinite,
        "preparation": recipe.preparation,
    }
    augment = _AUGMENTATIONS[recipe.augment]
    train_set = SliceDataset(study, split.train, augment=augment and augment(), keep=recipe.keep, **options)
    train_set.require_every_class()
    keep: Keep = "labelled" if recipe.keep == "labelled" else "all"
    val_set = SliceDataset(study, split.val or split.train, keep=keep, **options)
    if is_first_process():
        write_split(written, split)
    return PreparedData(study, split, train_set, val_set)


def claim_folder(out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder that holds anything, unless the run in it is to be resumed or may be overwritten.

    Raises:
        OutputFolderError: the folder is in use, or holds what trifuse did not write.
    """
    if not is_first_process():
        return
    if out.exists() and not out.is_dir():
        raise OutputFolderError(f"{out} is a file; choose a folder")
    if not out.exists() or not any(out.iterdir()) or (resume and (out / "run.json").exists()):
        out.mkdir(parents=True, exist_ok=True)
        return
    began = (out / "run.json").exists()
    ours = began or _failed_before_it_began(out)
    if not overwrite:
        hint = "pass --resume to continue it, --overwrite to start again" if began else "empty it"
        if ours and not began:
            hint = "a run failed there before it began; pass --overwrite to start again"
        raise OutputFolderError(f"{out} is not empty; {hint}, or choose another folder")
    if not ours:
        raise OutputFolderError(f"{out} is not empty and holds no run of trifuse; remove it by hand, if that is meant")
    shutil.rmtree(out)
    out.mkdir()


def _failed_before_it_began(out: Path) -> bool:
    """Tell whether a folder holds our cache, and nothing else but what a run writes before its ``run.json``."""
    cached = list((out / _CACHE_FOLDER).glob("*"))
    ours = {path.name for path in out.iterdir()} <= _BEFORE_A_RUN
    return ours and bool(cached) and all(path.suffix == ".npy" for path in cached)


def is_first_process() -> bool:
    """Tell whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def report_run(
    out: Path,
    model: nn.Module,
    data: PreparedData,
    recipe: DataRecipe,
    *,
    title: str,
    parts: Sequence[Part] = ("test",),
    command: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    draw: Callable[[Path, Path], Sequence[Picture]] = lambda log, folder: (),
    paper_tables: Sequence[PaperTable] = (),
    paper: str = "",
) -> Path:
    """Predict, score and describe what a finished run can do; return the path of its report.

    Args:
        out: the run's folder, with ``log.csv``; predictions go to ``predictions/<part>/``, pictures to ``figures/``.
        model: the network, with the weights to judge.
        data: what it was trained on.
        recipe: how that was prepared.
        title: of the report.
        parts: of the split to score, the headline first; a part without cases is left out, and where none is left
            the cases that chose the best epoch are scored.
        command: the words that do the run again.
        facts: more facts about the run.
        draw: draws what only this network has, from the log into a folder.
        paper_tables: what the publication reports.
        paper: how to cite it.
    """
    scored: list[Part] = [part for part in parts if data.cases_of(part)] or [data.validated_on]
    conventions = Conventions()
    per_slice = Conventions(aggregation="slice", slices="labelled" if recipe.keep == "labelled" else "all")
    evaluations, overlays = [], []
    figures = out / "figures"
    for part in scored:
        cases, predictions = data.cases_of(part), out / "predictions" / part
        predict_cases(
            model,
            data.study,
            cases,
            predictions,
            image_size=recipe.image_size,
            nonfinite=recipe.nonfinite,
        )
        rows = evaluate_cases(predictions, data.study, cases, conventions)
        evaluations.append(Evaluation(part, f"{_PART_TITLES[part]}, per volume", rows))
        if recipe.keep == "labelled":
            only = Conventions(slices="labelled")
            rows_labelled = evaluate_cases(predictions, data.study, cases, only)
            evaluations.append(
                Evaluation(f"{part}_labelled", f"{_PART_TITLES[part]}, labelled slices alone", rows_labelled)
            )
        slices = evaluate_cases(predictions, data.study, cases, per_slice)
        evaluations.append(Evaluation(f"{part}_slices", f"{_PART_TITLES[part]}, per slice", slices))
        tiles = collect_tiles(predictions, data.study, rows)
        folder = figures / part
        heading = f"{_PART_TITLES[part]}: predictions beside the truth"
        overlays.append(draw_overlays(tiles, data.study.class_names, folder, title=heading))
    log = out / "log.csv"
    epochs = read_log(log)
    splits = {part: data.cases_of(part) for part in ("train", "val", "test")}
    best = max(epochs, key=lambda row: row["val_dice"])
    return write_report(
        out,
        title=title,
        evaluations=evaluations,
        pictures=[*overlays, draw_training_curves(log, figures), *draw(log, figures)],
        facts={
            **describe_data(data.study, splits),
            "Slices": f"{len(data.train_set)} to train on, resized to {recipe.image_size}x{recipe.image_size} pixels",
            **describe_network(model),
            "Chosen": f"epoch {best['epoch']:.0f} of {len(epochs)}, by Dice on the {data.validated_on} cases",
            "Training time": format_seconds(sum(row["seconds"] for row in epochs)),
            **(facts or {}),
            **describe_environment(next(model.parameters()).device),
        },
        command=command,
        paper_tables=paper_tables,
        paper=paper,
    )
