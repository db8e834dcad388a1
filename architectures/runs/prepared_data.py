"""The data of a run: a cohort, its split, and the samples of the cases that train and validate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.data.layouts.split import Split, read_split, verify_split, write_split
from trifuse.architectures.data.samples.patch_dataset import GridPatches, PatchDataset, median_spacing_mm
from trifuse.architectures.data.samples.preprocessing import Slices
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.data.samples.slice_dataset import SliceDataset
from trifuse.architectures.evaluation.report import check_extras
from trifuse.architectures.evaluation.scoring import check_scorable
from trifuse.architectures.storage.text import listed
from trifuse.architectures.training.step import forward_with_side_inputs
from trifuse.architectures.training.validation import SliceValidation
from trifuse.kernels import DataError

from .folder import CACHE_FOLDER, SPLIT_FILE, is_main_process
from .recipes import DataRecipe

Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class PreparedData:
    """A cohort, its split, and the slices of the cases that train and validate.

    Attributes:
        cohort: the cohort.
        split: which cases train, validate and test.
        train_set: samples to train on.
        val_set: samples that are scored after every epoch.
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
        """What is scored after every epoch: the validation cases, or the training cases where there are none."""
        return "val" if self.split.val else "train"

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the files of the cases that train and validate, by case id."""
        return {**self.train_set.digests, **self.val_set.digests}

    def validation(self, batch_size: int) -> SliceValidation:
        """Return what scores a network on the validation set, giving it the side inputs that there are."""
        return SliceValidation(self.val_set, self.cohort.class_names, batch_size, forward_with_side_inputs)

    def scored(self, parts: Sequence[Part]) -> list[Part]:
        """Return which of some parts are scored, each once: those with cases; without any, those that validate."""
        return [part for part in dict.fromkeys(parts) if self.cases_of(part)] or [self.validated_on]

    def cases_of(self, part: Part) -> tuple[str, ...]:
        """Return the case ids of a part of the split."""
        return getattr(self.split, part)


def prepare_data(
    recipe: DataRecipe,
    out: Path,
    *,
    cache: Path | None = None,
    split: Split | None = None,
    side_inputs: Mapping[str, SideInputs] | None = None,
    scored: Sequence[Part] = (),
) -> PreparedData:
    """Open the cohort, split it, write the split into the run's folder, and prepare the slices.

    What the report will need is looked for as well: a missing package is found before work starts, not after.

    Args:
        recipe: which cases, and how they are prepared.
        out: the run's folder; a split that lies there already, from the run that is resumed, is used as it is.
        cache: folder of the prepared slices; None takes one in ``out``.
        split: another one than the recipe's; None takes that of `open_split`.
        side_inputs: what the cases bring beside their images, by case id; only with patches.
        scored: the parts that will be reported on; when the run begins their cases are read as for that.

    Raises:
        DataError: everything that is wrong with the cases, at once: those to train on, then those to report on.
        MissingExtra: scipy or matplotlib is not installed.
    """
    check_extras()
    if split is None:
        cohort, split = open_split(recipe, out)
    else:
        cohort = recipe.open()
        verify_split(cohort, split)
    preprocessing = recipe.preprocessing
    if preprocessing.patches is not None and preprocessing.patches.spacing_mm is None:
        spacing_mm = median_spacing_mm(cohort, split.train, preprocessing.nonfinite)
        recipe = recipe.with_preprocessing(patches=replace(preprocessing.patches, spacing_mm=spacing_mm))
        preprocessing = recipe.preprocessing
    options: dict[str, Any] = {"cache": cache or out / CACHE_FOLDER}
    samples: tuple[Any, Any] = (SliceDataset, SliceDataset)
    if preprocessing.patches is not None:
        samples = (PatchDataset, GridPatches)
        options["side_inputs"] = side_inputs
    elif side_inputs is not None:
        raise ValueError("side_inputs: expected none for whole slices; networks that take them are trained on patches")
    augment = recipe.augmentation.make(recipe.augment)
    training = {"augment": augment, "slices": recipe.slices, **options}
    train_set = samples[0](cohort, split.train, preprocessing, **training)
    train_set.require_every_class()
    slices: Slices = "labelled" if recipe.slices == "labelled" else "all"
    val_set = samples[1](cohort, split.val or split.train, preprocessing, slices=slices, **options)
    data = PreparedData(cohort, split, train_set, val_set, recipe, side_inputs)
    if is_main_process():
        if scored and not (out / SPLIT_FILE).exists():
            for part in data.scored(scored):
                check_scorable(cohort, data.cases_of(part), preprocessing.nonfinite)
        write_split(out / SPLIT_FILE, split, sealed=True)
    return data


def require_packages(recipe: DataRecipe) -> None:
    """Look for the packages with which cases are read and reported on, before anything is written.

    Raises:
        MissingExtra: one is not installed.
    """
    check_extras()
    with suppress(DataError, ValueError, OSError):  # which come again once the run has its folder
        recipe.open()


def open_split(recipe: DataRecipe, out: Path) -> tuple[Cohort, Split]:
    """Open the cohort and return it with the split of the run in ``out``: the one that lies there, or the recipe's.

    Raises:
        DataError: the one that lies there is not what the recipe says by now, as after its file was edited: cases that
            were trained on might test.
    """
    cohort = recipe.open()
    written = out / SPLIT_FILE
    if not written.exists():
        return cohort, recipe.choose_split(cohort)
    split = read_split(written, cohort)
    if recipe.split is None or Path(recipe.split).exists():
        said = recipe.said_split(cohort)
        moved = [case_id for part in get_args(Part) for case_id in {*getattr(said, part)} ^ {*getattr(split, part)}]
        if moved:
            got = f"{listed(sorted({*map(repr, moved)}))} in other parts than when the run began"
            hint = f"restore the split as it is in {written}, or begin a new run in another folder"
            raise DataError(recipe.split or cohort.root, "split", got=got, want="the split of the run", hint=hint)
    return cohort, split
