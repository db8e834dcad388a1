"""One run: a study in; a trained network, predictions, scores and a report out. Every network's ``train.py`` uses it."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

from torch import nn

from trifuse.kernels import CheckpointError, DataError, TrifuseError

from .data.augmentation import FlipRotate
from .data.cases import Layout, Study, Targets, open_images, open_study
from .data.slices import Keep, SliceDataset
from .data.split import Split, read_split, split_patients, verify_split, write_split
from .evaluation.figures import Picture, collect_tiles, draw_overlays, draw_training_curves
from .evaluation.metrics import Conventions
from .evaluation.predict import predict_cases
from .evaluation.report import (
    Evaluation,
    PaperTable,
    describe_data,
    describe_environment,
    describe_network,
    format_seconds,
    write_report,
)
from .evaluation.tables import evaluate_cases
from .pretrained import config_from_json, config_to_json, read_description
from .training.distributed import choose_device
from .training.epoch_log import read_log
from .training.run_folder import OutputFolderError

Part = Literal["train", "val", "test"]
SPLIT_FILE = "split.json"
PREDICTION_BATCH = 8
ARCHITECTURES = ("dino_unet",)


@dataclass(frozen=True)
class DataRecipe:
    """Which cases a run uses, and how their slices are prepared.

    Attributes:
        root: the study's folder.
        layout: ``"lascarqs"``, ``"plain"``, or ``"auto"``.
        targets: what to segment in the plain layout, each ``"3"``, ``"lv=3"`` or ``"wall=1,2"``.
        patient_pattern: regular expression that finds the patient in a case's name.
        split: JSON file that says which cases train, validate and test; None draws the split.
        val_cases: patterns of the cases that validate, and
        test_cases: of those that test; given either, all other cases train and nothing is drawn.
        val_from: what the drawn validation tenth is taken of: ``"all"`` patients, or those ``"remaining"`` for it.
        split_seed: of the drawn split.
        image_size: side of the square that slices are resized to, in pixels.
        keep: slices to train on: ``"all"``, those that show a target (``"foreground"``), or those on which anything
            is drawn (``"labelled"``).
        augment: ``"none"`` or ``"flip_rot"``.
        nonfinite: what to do with NaN and infinite voxels: ``"error"``, ``"zero"`` or ``"median"``.
    """

    root: str
    layout: Layout = "auto"
    targets: tuple[str, ...] = ()
    patient_pattern: str | None = None
    split: str | None = None
    val_cases: tuple[str, ...] = ()
    test_cases: tuple[str, ...] = ()
    val_from: Literal["all", "remaining"] = "all"
    split_seed: int = 42
    image_size: int = 448
    keep: Keep = "all"
    augment: Literal["none", "flip_rot"] = "none"
    nonfinite: Literal["error", "zero", "median"] = "error"

    def open(self) -> Study:
        """Find the cases."""
        return open_study(
            Path(self.root), self.layout, parse_targets(self.targets), patient_pattern=self.patient_pattern
        )

    def choose_split(self, study: Study) -> Split:
        """Read, build or draw the split, whichever the recipe says."""
        if self.split is not None:
            return read_split(Path(self.split), study)
        if not self.val_cases and not self.test_cases:
            return split_patients(study, seed=self.split_seed, val_from=self.val_from)
        names = [case.case_id for case in study.cases]
        test = matching_cases(study, names, self.test_cases)
        val = matching_cases(study, names, self.val_cases)
        train = tuple(name for name in names if name not in (*test, *val))
        return verify_split(study, Split(train, val, test))


def parse_targets(words: Sequence[str]) -> Targets | None:
    """Turn ``["lv=3", "wall=1,2"]`` into ``{"lv": [3], "wall": [1, 2]}``; a lone number gets the name "target".

    Raises:
        DataError: a word is not of that form.
    """
    targets: dict[str, list[int]] = {}
    for word in words:
        name, _, values = word.rpartition("=")
        try:
            targets[name or "target"] = [int(value) for value in values.split(",")]
        except ValueError as error:
            raise DataError(word, "target", want="a label value or NAME=VALUE[,VALUE], such as lv=3") from error
    return targets or None


def matching_cases(study: Study, names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names that match any of the patterns.

    Raises:
        DataError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise DataError(study.root, "cases", got=f"0 cases that match {pattern!r}", want=f"some of {list(names)}")
    return tuple(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


class RecipeError(TrifuseError):
    """A recipe names a field that there is none of, or gives one a value that it cannot have."""


def recipe_from(
    kind: type, file: Path | None = None, given: Mapping[str, Any] | None = None, settings: Sequence[str] = ()
) -> Any:
    """Build a run's recipe from its defaults, a TOML file, values by dotted name, and ``"field=value"`` words.

    Later sources win. A value in a word is JSON where it can be, and text where not.

    Raises:
        RecipeError: naming the field and, for one that is unknown, the nearest known one.
    """
    values: dict[str, Any] = config_to_json(kind(DataRecipe(root="")))
    sources: list[tuple[str, Any]] = []
    if file is not None:
        try:
            sources += _dotted(tomllib.loads(Path(file).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{file}: {error}") from error
    sources += [(name, _as_value(value)) for name, value in (given or {}).items()]
    for word in settings:
        name, equals, text = word.partition("=")
        if not equals:
            raise RecipeError(f"{word!r}: expected FIELD=VALUE, for example training.lr=1e-4")
        sources.append((name, _parsed(text)))
    for name, value in sources:
        _put(values, kind, name, value)
    if not values["data"]["root"]:
        raise RecipeError("data.root: expected the folder of the study")
    try:
        return config_from_json(kind, values, "recipe")
    except CheckpointError as error:
        raise RecipeError(str(error)) from error


def _dotted(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in table.items():
        pairs += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs


def _as_value(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _put(values: dict[str, Any], kind: type, dotted: str, value: Any) -> None:
    """Set a field of nested values, after checking that each name on the way is one of the dataclass's."""
    *sections, name = dotted.split(".")
    hints = get_type_hints(kind)
    for section in sections:
        if section not in hints or not is_dataclass(hints[section]):
            raise RecipeError(f"{dotted}: there is no section {section!r}{_nearest(section, hints)}")
        values, hints = values[section], get_type_hints(hints[section])
    if name not in hints or is_dataclass(hints[name]):
        raise RecipeError(f"{dotted}: there is no field {name!r}{_nearest(name, hints)}")
    values[name] = value


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


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

    A split that lies in ``out`` already, from the run that is resumed, is used as it is.

    Raises:
        DataError: everything that is wrong with the cases, at once.
    """
    study = recipe.open()
    written = out / SPLIT_FILE
    split = read_split(written, study) if written.exists() else recipe.choose_split(study)
    cache = cache or out / "cache"
    options: dict[str, Any] = {"image_size": recipe.image_size, "cache": cache, "nonfinite": recipe.nonfinite}
    augment = FlipRotate() if recipe.augment == "flip_rot" else None
    train_set = SliceDataset(study, split.train, augment=augment, keep=recipe.keep, **options)
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
    if not overwrite:
        hint = "pass --resume to continue it, --overwrite to start again" if (out / "run.json").exists() else "empty it"
        raise OutputFolderError(f"{out} is not empty; {hint}, or choose another folder")
    if not (out / "run.json").exists():
        raise OutputFolderError(f"{out} is not empty and holds no run of trifuse; remove it by hand, if that is meant")
    shutil.rmtree(out)
    out.mkdir()


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
            batch_size=PREDICTION_BATCH,
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
        folder.mkdir(parents=True, exist_ok=True)
        overlays.append(draw_overlays(tiles, data.study.class_names, folder))
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


_PART_TITLES = {"train": "Training cases", "val": "Validation cases", "test": "Test cases"}


# ------------------------------------------------------------------------------------------- using a finished network


def load_network(folder: Path) -> tuple[Any, int]:
    """Return the network of a run, or of a folder that ``save_pretrained`` wrote, and the image size it was trained at.

    The size is that of the run; a network without a run gets DINOv2's 448 pixels.

    Raises:
        CheckpointError: there is no network of ours, or it is damaged.
    """
    run = folder / "run.json"
    weights = folder / "best" if run.exists() else folder
    architecture = read_description(weights)["architecture"]
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{weights}: unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    package = import_module(f"{__package__}.{architecture}")
    network = next(value for value in vars(package).values() if getattr(value, "architecture", None) == architecture)
    size = json.loads(run.read_text())["config"]["data"]["image_size"] if run.exists() else DataRecipe.image_size
    return network.from_pretrained(weights).eval(), size


def predict_images(
    model_folder: Path,
    images: Path,
    out: Path,
    *,
    image_size: int | None = None,
    batch_size: int = PREDICTION_BATCH,
    device: str = "auto",
    nonfinite: Literal["error", "zero", "median"] = "error",
) -> list[Path]:
    """Segment a NIfTI file, a folder of them, or the images of a study; return the paths of the label maps."""
    model, trained_size = load_network(model_folder)
    study = open_images(images)
    model.to(choose_device(device))
    cases = [case.case_id for case in study.cases]
    size = image_size or trained_size
    return predict_cases(model, study, cases, out, image_size=size, batch_size=batch_size, nonfinite=nonfinite)
