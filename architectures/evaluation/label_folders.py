"""Two plain folders of label maps, predictions and truth, paired by name: no images, no cohort around them.

What could make scores mean something else is refused, and all of it at once, before the first score is computed: names
that do not pair, other grids, values that are no integers, and values that the truth does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.architectures.data.layouts.cohort import MAX_CLASSES, Case, Cohort
from trifuse.architectures.data.layouts.found import BACKGROUND, by_name, chosen_classes, parse_targets
from trifuse.architectures.data.layouts.open_cohort import with_patients
from trifuse.architectures.data.layouts.read_case import map_labels
from trifuse.architectures.data.volumes.files import nifti_files, unread_images
from trifuse.architectures.data.volumes.nifti import read_labels
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.storage.text import listed, natural_key
from trifuse.kernels import DataError

from .metrics import Conventions
from .scoring import Pair, Row, check_spacing, score_case

LABEL_MAPS = "label maps"


@dataclass(frozen=True)
class LabelFolders:
    """Predictions and truth that fit each other.

    Attributes:
        cohort: the truth, a case for each of its label maps, with what their values mean.
        predictions: the file of each case that is to be scored, by its name.
    """

    cohort: Cohort
    predictions: Mapping[str, Path]


def is_label_folder(folder: Path) -> bool:
    """Tell whether a folder holds label maps themselves: NIfTI files, and not the signs of a cohort."""
    if not folder.is_dir() or any(layout.detect(folder) for layout in LAYOUTS):
        return False
    return next(nifti_files(folder), None) is not None


def label_cohort(labels: Path, *, patient_pattern: str | None = None, frame: int | None = None) -> Cohort:
    """Take a folder of label maps for a cohort without images, the values of which mean nothing yet.

    Args:
        labels: the folder of ``<case>.nii.gz`` or ``<case>.nii``.
        patient_pattern: see ``open_cohort``; by default every case is its own patient.
        frame: which frame of files of four dimensions.

    Raises:
        DataError: two files have one name, a file has a format that is not read, or the pattern does not fit.
    """
    problems: list[DataError] = []
    files = _named(labels, problems)
    cases = [Case(name, name, image=path, label=path, frame=frame) for name, path in files.items()]
    cases, unmatched = with_patients(sorted(cases, key=lambda case: natural_key(case.case_id)), patient_pattern)
    if problems := problems + unmatched:
        raise DataError.merge(problems)
    return Cohort(labels, LABEL_MAPS, (BACKGROUND,), {}, True, tuple(cases))


def open_label_folders(
    predictions: Path,
    cohort: Cohort,
    case_ids: Sequence[str],
    *,
    targets: Sequence[str] | None = None,
    accept_spacing: bool = False,
) -> LabelFolders:
    """Pair predictions with the truth, and read both once to learn what is wrong.

    Args:
        predictions: folder of ``<case>.nii.gz`` or ``<case>.nii``, label values in them.
        cohort: the truth, from `label_cohort`.
        case_ids: the cases to score; predictions of its other cases are left alone.
        targets: names and values of the classes, such as ``["lv=3", "wall=1,2"]``; all other values are background.
            By default every value of the truth above 0 is a class, ``"label 3"``.
        accept_spacing: go on even if a spacing, or its unit, is implausible.

    Raises:
        DataError: names that do not pair, files that cannot be read, other grids, values that are no integers, a
            prediction with values that are no target and in no label map of the truth, or no class; all that is wrong
            with names at once, or else with files, or else with values.
    """
    problems: list[DataError] = []
    files = _named(predictions, problems)
    known = {case.case_id for case in cohort.cases}
    problems += [
        DataError(files[name], "name", got="no label map of that name", want=f"one in {cohort.root}")
        for name in files
        if name not in known
    ]
    cases = [cohort.case(case_id) for case_id in case_ids]
    problems += [
        DataError(case.label, "name", got="no prediction of that name", want=f"one in {predictions}")
        for case in cases
        if case.case_id not in files
    ]
    if problems:
        raise DataError.merge(problems)
    pairs = {case.case_id: files[case.case_id] for case in cases}
    values_of = _values(cases, pairs, accept_spacing=accept_spacing)
    return LabelFolders(_with_classes(cohort, targets, *values_of), pairs)


def score_label_folders(folders: LabelFolders, conventions: Conventions) -> list[Row]:
    """Score every prediction against its truth, reading one pair at a time: one row per class and unit.

    Raises:
        DataError: a file has changed since `open_label_folders` read it.
    """
    rows: list[Row] = []
    cohort = folders.cohort
    for case_id, path in folders.predictions.items():
        case = cohort.case(case_id)
        truth, prediction = _read_pair(case, path)
        rows += score_case(
            map_labels(cohort, prediction).voxels,
            map_labels(cohort, truth).voxels,
            truth.spacing_mm,
            cohort.class_names,
            conventions,
            case_id=case_id,
            patient=case.patient,
            labelled=np.flatnonzero((truth.voxels != 0).any((1, 2))),
        )
    return rows


def pairs_of_classes(folders: LabelFolders) -> Iterator[Pair]:
    """Yield each case with its true classes and the predicted ones."""
    for case_id, path in folders.predictions.items():
        case = folders.cohort.case(case_id)
        truth, prediction = (map_labels(folders.cohort, each) for each in _read_pair(case, path))
        yield case, truth, prediction.voxels


def _named(folder: Path, problems: list[DataError]) -> dict[str, Path]:
    """Return a folder's label maps by name; files beside them that hold the same in another format do not count."""
    files = by_name(nifti_files(folder), problems)
    problems += [each for each in unread_images(folder) if Path(str(each.file)).stem not in files]
    return files


def _read_pair(case: Case, prediction: Path) -> tuple[Volume, Volume]:
    assert case.label is not None  # `label_cohort` gives every case one
    truth = read_labels(case.label, frame=case.frame)
    return truth, read_labels(prediction, like=truth, frame=case.frame)


def _values(
    cases: Sequence[Case], predictions: Mapping[str, Path], *, accept_spacing: bool
) -> tuple[set[int], dict[Path, set[int]]]:
    """Return the values of the truth of all cases, the background's among them, and those of each prediction."""
    true = {0}
    predicted: dict[Path, set[int]] = {}
    problems: list[DataError] = []
    for case in cases:
        path = predictions[case.case_id]
        try:
            truth, prediction = _read_pair(case, path)
            if not accept_spacing:
                check_spacing(truth.path, [truth, prediction])
        except DataError as error:
            problems.append(error)
            continue
        found, predicted[path] = (set(np.unique(each.voxels).tolist()) for each in (truth, prediction))
        true |= found
        if below := sorted(value for value in found if value < 0):
            problems.append(DataError(case.label, "labels", got=listed(below), want="values from 0"))
    if problems:
        raise DataError.merge(problems)
    return true, predicted


def _with_classes(
    cohort: Cohort, targets: Sequence[str] | None, true: set[int], predicted: Mapping[Path, set[int]]
) -> Cohort:
    """Say which values are which classes, if predictions have no others than the truth."""
    named = parse_targets(targets or ())
    if named is None:
        named = {f"label {value}": [value] for value in sorted(true - {0})}
    if not named:
        raise DataError(cohort.root, "labels", got="no value above 0", want="at least one class to score")
    if len(named) >= MAX_CLASSES:
        hint = "are these images? otherwise choose some of them with targets=NAME=VALUE"
        raise DataError(cohort.root, "classes", got=len(named), want=f"at most {MAX_CLASSES - 1}", hint=hint)
    anywhere = true.union(*predicted.values())
    problems = [
        DataError(cohort.root, f"target {name}", got=f"{listed(values)} in no label map", want=_listed_values(true))
        for name, values in named.items()
        if not anywhere & {*values}
    ]
    known = true.union(*named.values())
    hint = "renumber the predictions, or name what are classes with targets=NAME=VALUE"
    problems += [
        DataError(path, "values", got=listed(sorted(values - known)), want=_listed_values(true), hint=hint)
        for path, values in predicted.items()
        if values - known
    ]
    if problems:
        raise DataError.merge(problems)
    classes = chosen_classes(cohort.root, named)
    return replace(cohort, class_names=classes.names, label_map=classes.label_map)


def _listed_values(true: set[int]) -> str:
    return f"values of the truth: {listed(sorted(true))}"
