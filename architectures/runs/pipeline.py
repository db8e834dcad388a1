"""One run: a cohort in; a trained network, predictions, scores and a report out. Networks' ``train.py`` use it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from torch import nn

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.data.layouts.split import Split, read_split, write_split
from trifuse.architectures.data.samples.augmentation import FlipRotate, TransUNetAugmentation
from trifuse.architectures.data.samples.nnunet_augmentation import NnUNetAugmentation
from trifuse.architectures.data.samples.patch_dataset import (
    GridPatches,
    PatchAugment,
    PatchDataset,
    median_spacing_mm,
)
from trifuse.architectures.data.samples.preprocessing import Slices
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.data.samples.slice_dataset import Augment, SliceDataset
from trifuse.architectures.evaluation.charts import draw_training_curves
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.overlays import collect_tiles, draw_overlays
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.predict import predict_cases
from trifuse.architectures.evaluation.report import (
    Evaluation,
    PaperTable,
    check_extras,
    describe_data,
    describe_environment,
    describe_network,
    format_seconds,
    write_report,
)
from trifuse.architectures.evaluation.scoring import evaluate_cases
from trifuse.architectures.storage.epoch_log import SMOOTHED, read_log
from trifuse.architectures.training.distributed import open_world
from trifuse.architectures.training.loop import forward_with_side_inputs
from trifuse.architectures.training.run_folder import LOCK_FILE, OutputFolderError
from trifuse.architectures.training.validation import SliceValidation
from trifuse.kernels import DataError

from .recipes import DataRecipe

Part = Literal["train", "val", "test"]
SPLIT_FILE = "split.json"
_CACHE_FOLDER = "cache"
FIRST_PASS_FOLDER = "first_pass"  # networks that a run needs before its own, each a run
_BEFORE_A_RUN = {SPLIT_FILE, _CACHE_FOLDER, FIRST_PASS_FOLDER, LOCK_FILE}  # all that a run writes before its run.json
_AUGMENTATIONS: dict[str, Callable[[], Augment | PatchAugment] | None] = {
    "none": None,
    "flip_rot": FlipRotate,
    "transunet": TransUNetAugmentation,
    "nnunet": NnUNetAugmentation,
}
MakeSideInputs = Callable[[Any, Cohort, Split, Path], Mapping[str, SideInputs]]
_PART_TITLES = {"train": "Training cases", "val": "Validation cases", "test": "Test cases"}


@dataclass(frozen=True)
class PreparedData:
    """A cohort, its split, and the slices of the cases that train and validate.

    Attributes:
        cohort: the cohort.
        split: which cases train, validate and test.
        train_set: samples to train on.
        val_set: samples that choose the best epoch.
        recipe: how they were prepared; what it left to the cohort is filled in.
        side_inputs: what the cases bring beside their images; None where they bring nothing.
    """

    cohort: Cohort
    split: Split
    train_set: SliceDataset | PatchDataset
    val_set: SliceDataset | GridPatches
    recipe: DataRecipe
    side_inputs: Mapping[str, SideInputs] | None = None

    @property
    def validated_on(self) -> Part:
        """Where the best epoch is chosen: on the validation cases, or on the training cases where there are none."""
        return "val" if self.split.val else "train"

    def validation(self, batch_size: int) -> SliceValidation:
        """Return what scores a network on the validation set, giving it the side_inputs that there are."""
        return SliceValidation(self.val_set, self.cohort.class_names, batch_size, forward_with_side_inputs)

    def cases_of(self, part: Part) -> tuple[str, ...]:
        """Return the case ids of a part of the split."""
        return getattr(self.split, part)


def prepare_data(
    recipe: DataRecipe, out: Path, *, cache: Path | None = None, side_inputs: Mapping[str, SideInputs] | None = None
) -> PreparedData:
    """Open the cohort, split it, write the split into the run's folder, and prepare the slices.

    What the report will need is looked for as well: a missing package is found before work starts, not after.

    Args:
        recipe: which cases, and how they are prepared.
        out: the run's folder; a split that lies there already, from the run that is resumed, is used as it is.
        cache: folder of the prepared slices; None takes one in ``out``.
        side_inputs: what the cases bring beside their images, by case id; only with patches.

    Raises:
        DataError: everything that is wrong with the cases, at once.
        MissingExtra: scipy or matplotlib is not installed.
    """
    check_extras()
    cohort, split = open_split(recipe, out)
    preprocessing = recipe.preprocessing
    if preprocessing.patches is not None and preprocessing.patches.spacing_mm is None:
        spacing_mm = median_spacing_mm(cohort, split.train, preprocessing.nonfinite)
        recipe = recipe.with_preprocessing(patches=replace(preprocessing.patches, spacing_mm=spacing_mm))
        preprocessing = recipe.preprocessing
    options: dict[str, Any] = {"cache": cache or out / _CACHE_FOLDER}
    samples: tuple[Any, Any] = (SliceDataset, SliceDataset)
    if preprocessing.patches is not None:
        samples = (PatchDataset, GridPatches)
        options["side_inputs"] = side_inputs
    elif side_inputs is not None:
        raise ValueError("side_inputs: expected none for whole slices; networks that take them are trained on patches")
    augment = _AUGMENTATIONS[recipe.augment]
    training = {"augment": augment and augment(), "slices": recipe.slices, **options}
    train_set = samples[0](cohort, split.train, preprocessing, **training)
    train_set.require_every_class()
    slices: Slices = "labelled" if recipe.slices == "labelled" else "all"
    val_set = samples[1](cohort, split.val or split.train, preprocessing, slices=slices, **options)
    if is_main_process():
        write_split(out / SPLIT_FILE, split)
    return PreparedData(cohort, split, train_set, val_set, recipe, side_inputs)


def open_split(recipe: DataRecipe, out: Path) -> tuple[Cohort, Split]:
    """Open the cohort and return it with the split of the run in ``out``: the one that lies there, or the recipe's."""
    cohort = recipe.open()
    written = out / SPLIT_FILE
    return cohort, read_split(written, cohort) if written.exists() else recipe.choose_split(cohort)


def claim_folder(out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder that holds anything, unless the run in it is to be resumed or may be overwritten.

    Raises:
        OutputFolderError: the folder is in use, or holds what trifuse did not write.
    """
    if not is_main_process():
        return
    if out.exists() and not out.is_dir():
        raise OutputFolderError(f"{out} is a file; choose a folder")
    out.mkdir(parents=True, exist_ok=True)
    began = (out / "run.json").exists()
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
    cached = list((out / _CACHE_FOLDER).glob("*"))
    ours = {path.name for path in out.iterdir()} <= _BEFORE_A_RUN
    return ours and bool(cached) and all(path.suffix == ".npy" for path in cached)


def is_main_process() -> bool:
    """Tell whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


class RunOptions(TypedDict, total=False):
    """How a run is started, and what becomes of it at its end.

    Keys:
        resume: continue the run in the folder.
        overwrite: remove the run in the folder first.
        force_resume: continue although the recipe has changed.
        tensorboard: also write TensorBoard files.
        parts: of the split to predict, score and report; the test cases where nothing is said.
        command: the words to put into the report as the way to do it again.
    """

    resume: bool
    overwrite: bool
    force_resume: bool
    tensorboard: bool
    parts: Sequence[Part]
    command: Sequence[str]


def train_and_report(
    recipe: Any,
    out: Path,
    network: type,
    fit_network: Callable[..., object],
    describe: Callable[[Any, Any, PreparedData], dict[str, Any]],
    *,
    sigmoid: bool = False,
    side_inputs: MakeSideInputs | None = None,
    resume: bool = False,
    overwrite: bool = False,
    force_resume: bool = False,
    tensorboard: bool = False,
    parts: Sequence[Part] = ("test",),
    command: Sequence[str] = (),
) -> Path | None:
    """Run a network's recipe from its data to ``out/report.md``; return that path, or None on all ranks but the first.

    Args:
        recipe: has ``data``, ``network`` and ``training``.
        out: the run's folder.
        network: the class, which ``recipe.network`` configures.
        fit_network: trains it: ``fit_network(model, recipe, data, out, **options)``, the options being those of `fit`.
        describe: ``describe(best, recipe, data)`` returns the arguments of `report_run` that only this network knows.
        sigmoid: whether one logit may stand for two classes.
        side_inputs: ``side_inputs(recipe, cohort, split, out)`` returns what cases bring beside their images. It
            is called on every rank, once the folder is claimed, and may itself train networks below ``out``.
        resume, overwrite, force_resume, tensorboard, parts, command: see `RunOptions`.

    Raises:
        OutputFolderError: ``out`` is in use, or holds another run.
        DataError: cases are unusable, or have other classes than the network.
        MissingExtra: scipy or matplotlib is not installed.
        CheckpointError, NumericError, Interrupted: see `fit`.
    """
    with open_world(recipe.training.device) as world:  # once: processes that part cannot safely meet again
        with world.raise_on_any_rank():  # the others wait until the first rank has claimed the folder
            claim_folder(out, resume=resume or force_resume, overwrite=overwrite)
        brought = None if side_inputs is None else side_inputs(recipe, *open_split(recipe.data, out), out)
        with world.raise_on_any_rank():
            data = prepare_data(recipe.data, out, side_inputs=brought)
            recipe = with_classes(recipe, len(data.cohort.class_names), sigmoid=sigmoid)
            recipe = replace(recipe, data=data.recipe)
            model = network(recipe.network)
        fit_network(model, recipe, data, out, resume=resume, force_resume=force_resume, tensorboard=tensorboard)
    if not world.is_main:
        return None
    best = cast(Any, network).from_pretrained(out / "best").to(next(model.parameters()).device)
    return report_run(out, best, data, recipe.data, parts=parts, command=command, **describe(best, recipe, data))


def with_classes(recipe: Any, classes: int, *, sigmoid: bool = False) -> Any:
    """Give a recipe's network the cohort's number of classes, unless it was given one of its own: 1 is a sigmoid.

    Raises:
        DataError: its own does not fit the cohort.
    """
    network = recipe.network
    if network.num_classes == type(network).num_classes:
        return replace(recipe, network=replace(network, num_classes=classes))
    if network.num_classes not in ({1, 2} if sigmoid and classes == 2 else {classes}):
        got, want = f"{classes} with the background", f"{network.num_classes}, the network's num_classes"
        raise DataError(recipe.data.root, "classes", got=got, want=want, hint="leave network.num_classes to the cohort")
    return recipe


def report_run(
    out: Path,
    model: nn.Module,
    data: PreparedData,
    recipe: DataRecipe,
    *,
    title: str,
    parts: Sequence[Part] = ("test",),
    command: Sequence[str] = (),
    conventions: Sequence[str] = ("strict",),
    per_slice: bool = False,
    mark: str = "",
    facts: Mapping[str, str] | None = None,
    draw: Callable[[Path, Evaluation, Path], Sequence[Picture]] = lambda log, scored, folder: (),
    paper_tables: Sequence[PaperTable] = (),
    paper: str = "",
) -> Path:
    """Predict, score and describe what a finished run can do; return the path of its report.

    Args:
        out: the run's folder, with ``log.csv``; predictions go to ``predictions/<part>/``, pictures to ``figures/``.
        model: the network, with the weights to judge.
        data: what it was trained on.
        recipe: how that was prepared: with patches, the one that names their spacing.
        title: of the report.
        parts: of the split to score, the headline first; a part without cases is left out, and where none is left
            the cases that chose the best epoch are scored.
        command: the words that do the run again.
        conventions: of empty masks and distances; several are shown side by side, the first gives the headline.
        per_slice: also score each slice by itself.
        mark: what the title of every table and of every overlay has to say.
        facts: more facts about the run.
        draw: draws what only this network has, from the log and the scores of the headline into a folder.
        paper_tables: what the publication reports.
        paper: how to cite it.
    """
    scored: list[Part] = [part for part in parts if data.cases_of(part)] or [data.validated_on]
    evaluations, overlays = [], []
    figures = out / "figures"
    for part in scored:
        folder = out / "predictions" / part
        predict_cases(
            model,
            data.cohort,
            data.cases_of(part),
            folder,
            recipe.preprocessing,
            side_inputs=data.side_inputs,
        )
        found = _evaluate(folder, part, data, conventions, labelled=recipe.slices == "labelled", per_slice=per_slice)
        found = [replace(each, title=_marked(each.title, mark)) for each in found]
        evaluations += found
        tiles = collect_tiles(folder, data.cohort, found[0].rows)
        heading = _marked(f"{_PART_TITLES[part]}: predictions beside the truth", mark)
        overlays.append(draw_overlays(tiles, data.cohort.class_names, figures / part, title=heading))
    log = out / "log.csv"
    epochs = read_log(log)
    splits = {part: data.cases_of(part) for part in ("train", "val", "test")}
    chosen = json.loads((out / "best" / "score.json").read_bytes())
    score = "Dice, averaged over epochs," if chosen["metric"].endswith(SMOOTHED) else "Dice"
    return write_report(
        out,
        title=title,
        evaluations=evaluations,
        pictures=[*overlays, draw_training_curves(log, figures), *draw(log, evaluations[0], figures)],
        facts={
            **describe_data(data.cohort, splits),
            "Slices": _describe_slices(data.train_set, recipe),
            **describe_network(model),
            "Chosen": f"epoch {chosen['epoch']} of {len(epochs)}, by {score} on the {data.validated_on} cases",
            "Training time": format_seconds(sum(row["seconds"] for row in epochs)),
            **(facts or {}),
            **describe_environment(next(model.parameters()).device),
        },
        command=command,
        paper_tables=paper_tables,
        paper=paper,
    )


def _describe_slices(train_set: SliceDataset | PatchDataset, recipe: DataRecipe) -> str:
    size = recipe.preprocessing.image_size
    side = f"{size}x{size} pixels"
    if isinstance(train_set, SliceDataset):
        return f"{len(train_set)} to train on, resized to {side}"
    rows, columns = train_set.spacing_mm
    pixels = f"pixels of {rows:.3g} x {columns:.3g} mm"
    return f"{train_set.len_slices} to train on, of {pixels}, seen in {len(train_set)} patches of {side} an epoch"


def _marked(title: str, mark: str) -> str:
    return f"{title} ({mark})" if mark else title


def _evaluate(
    predictions: Path, part: Part, data: PreparedData, words: Sequence[str], *, labelled: bool, per_slice: bool
) -> list[Evaluation]:
    """Score the predictions of a part per volume, and in the other ways that its report shows."""

    def scored(name: str, title: str, **choices: Any) -> Evaluation:
        rows, *beside = (
            evaluate_cases(predictions, data.cohort, data.cases_of(part), Conventions(word, **choices))
            for word in words
        )
        return Evaluation(name, f"{_PART_TITLES[part]}, {title}", rows, beside)

    slices = "labelled" if labelled else "all"
    evaluations = [scored(part, "per volume")]
    if labelled:
        evaluations.append(scored(f"{part}_labelled", "labelled slices alone", slices=slices))
    if per_slice:
        evaluations.append(scored(f"{part}_slices", "per slice", aggregation="slice", slices=slices))
    return evaluations
