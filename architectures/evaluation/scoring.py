"""From a folder of predictions to scored rows: one per case and class, or per slice; nothing is dropped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.data.layouts.cohort import Case, Cohort
from trifuse.architectures.data.layouts.read_case import load_raw_case, map_labels
from trifuse.architectures.data.volumes.files import NonFinite
from trifuse.architectures.data.volumes.nifti import read_labels
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.storage.file_names import as_stored, composed
from trifuse.architectures.storage.text import listed
from trifuse.kernels import DataError

from .metrics import MM3_PER_ML, Conventions, case_metrics, failure_metrics

OK = "ok"
MISSING = "missing prediction"
EXTRA = "extra prediction"
NOTHING_LABELLED = "no labelled slice"

Labels = NDArray[np.integer]
Pair = tuple[Case, Volume, Labels | None]  # a case, its true classes, the predicted ones


class Volumes(NamedTuple):
    """How large a class is in mL, in truth and by the prediction; NaN where that is missing or unusable."""

    truth_ml: float
    prediction_ml: float


@dataclass(frozen=True)
class Row:
    """The scores of one class in one case, or in one slice of it (``slice`` counts from 0).

    ``volumes`` are not kept in tables: None in rows that were read back, and where nothing is known in mL.
    """

    case_id: str
    patient: str
    class_name: str
    slice: int | None
    status: str
    scores: dict[str, float]
    conventions: Conventions
    volumes: Volumes | None = None

    @property
    def failed(self) -> bool:
        """Whether the scores stand for a prediction that was missing, unreadable or of no known case."""
        return self.status not in (OK, NOTHING_LABELLED)


def score_case(
    prediction: Labels,
    truth: Labels,
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
    conventions: Conventions,
    *,
    case_id: str,
    patient: str,
    labelled: Sequence[int] | NDArray | None = None,
) -> list[Row]:
    """Score predicted class ids of shape (D, H, W), slices first, against the true ones: one row per class and unit.

    ``class_names[0]`` is the background and gets no row. ``labelled`` are the slices on which anything is drawn;
    by default those with a class above 0.

    Raises:
        ShapeError: the two differ in shape.
        ValueError: one of them has a value that is no class.
    """
    rows = []
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if beyond := values_beyond(labels, len(class_names)):
            raise ValueError(f"{name}: expected class ids below {len(class_names)}, got {listed(beyond)}")
    if conventions.slices == "all":
        labelled = range(len(truth))
    elif labelled is None:
        labelled = np.flatnonzero((truth != 0).any((1, 2)))
    voxel_ml = math.prod(spacing_mm) / MM3_PER_ML
    for class_id, class_name in enumerate(class_names[1:], start=1):
        for index, p, t in _units(prediction == class_id, truth == class_id, labelled, conventions.aggregation):
            scores = case_metrics(p, t, spacing_mm[-t.ndim :], conventions, voxel_ml=voxel_ml)
            volumes = Volumes(int(t.sum()) * voxel_ml, int(p.sum()) * voxel_ml)
            known = volumes if conventions.volume_unit == "ml" else None
            rows.append(Row(case_id, patient, class_name, index, OK, scores, conventions, known))
    if not rows:
        undefined = dict.fromkeys(conventions.metrics, math.nan)
        rows = [Row(case_id, patient, name, None, NOTHING_LABELLED, undefined, conventions) for name in class_names[1:]]
    return rows


def evaluate_cases(
    pred_dir: Path,
    cohort: Cohort,
    case_ids: Sequence[str],
    conventions: Conventions | None = None,
    *,
    accept_spacing: bool = False,
    label_values: bool = False,
) -> list[Row]:
    """Score ``<case_id>.nii.gz`` of a folder against the labels of a cohort, reading one case at a time.

    Nothing is dropped: a prediction that is missing, unreadable or on another grid gets the worst scores, and so does
    a file of the folder that belongs to no case of the cohort. Files of the cohort's other cases are left alone.

    Args:
        pred_dir: folder of predicted class ids, as `predict_cases` writes them.
        cohort: where the labels are.
        case_ids: the cases to score.
        conventions: how to score; by default strict, one score per volume. In a cohort without spacings everything
            is in voxels, whatever they say.
        accept_spacing: score even if the reader found a spacing, or its unit, implausible.
        label_values: whether predictions hold the cohort's own label values, as its labels do, in place of class ids.

    Raises:
        DataError: no case is asked for, a case is unknown or has no label, a label cannot be read, a spacing looks
            implausible, or a prediction has values that are no class; all such problems at once.
    """
    conventions = conventions or Conventions()
    if not cohort.has_spacing:
        conventions = conventions.in_voxels()
    rows: list[Row] = []
    problems: list[DataError] = []
    values = _Values(cohort)
    for case in _find_labelled(cohort, case_ids):
        try:
            raw, truth = _read_truth(cohort, case, "zero", accept_spacing=accept_spacing)
        except DataError as error:
            problems.append(error)
            continue
        prediction, status = _read_prediction(prediction_path(pred_dir, case.case_id), truth)
        if prediction is not None:
            try:
                if label_values:
                    values.note(prediction, raw)
                prediction = map_labels(cohort, prediction) if label_values else _of_classes(cohort, prediction)
            except DataError as error:
                problems.append(error)
                continue
        labelled = np.flatnonzero((raw.voxels != 0).any((1, 2)))
        scored = _score_or_fail(
            None if prediction is None else prediction.voxels, truth, labelled, cohort.class_names, conventions, case
        )
        rows += scored if status == OK else [replace(row, status=status) for row in scored]
    if label_values:
        problems += values.strangers()
    if problems:
        raise DataError.merge(problems)
    worst = failure_metrics(None, None, conventions)
    for stem in _extra_predictions(pred_dir, cohort):
        rows += [Row(stem, stem, name, None, EXTRA, worst, conventions) for name in cohort.class_names[1:]]
    return rows


def read_pairs(
    pred_dir: Path, cohort: Cohort, case_ids: Sequence[str], *, label_values: bool = False
) -> Iterator[Pair]:
    """Yield each case with its true classes, and the predicted ones where there are any: see `evaluate_cases`."""
    for case in _find_labelled(cohort, case_ids):
        _, truth = _read_truth(cohort, case, "zero", accept_spacing=True)
        prediction, _ = _read_prediction(prediction_path(pred_dir, case.case_id), truth)
        if prediction is not None and label_values:
            prediction = map_labels(cohort, prediction)
        yield case, truth, None if prediction is None else prediction.voxels


def check_scorable(cohort: Cohort, case_ids: Sequence[str], nonfinite: NonFinite) -> None:
    """Read cases as they will be predicted and scored, to learn what is wrong with them before there is a network.

    Args:
        cohort: where they are.
        case_ids: the cases; none is fine.
        nonfinite: what prediction does with NaN and infinite voxels.

    Raises:
        DataError: images or labels cannot be read, labels are missing or have no class, or a spacing looks implausible;
            all such problems at once.
    """
    problems: list[DataError] = []
    for case in _find_labelled(cohort, case_ids) if case_ids else ():
        try:
            _read_truth(cohort, case, nonfinite, accept_spacing=False)
        except DataError as error:
            problems.append(error)
    if problems:
        raise DataError.merge(problems)


def _read_truth(cohort: Cohort, case: Case, nonfinite: NonFinite, *, accept_spacing: bool) -> tuple[Volume, Volume]:
    """Return the labels of a labelled case as they are stored, and as classes."""
    image, raw = load_raw_case(case, nonfinite=nonfinite)
    assert raw is not None  # `_find_labelled` has seen to it
    if not accept_spacing:
        check_spacing(case.label, (image, raw))
    return raw, map_labels(cohort, raw)


def find_cases(cohort: Cohort, case_ids: Sequence[str]) -> list[Case]:
    """Return the cases of these names.

    Raises:
        DataError: no name is given, or some belong to no case of the cohort; all of them are listed.
    """
    known = {case.case_id: case for case in cohort.cases}
    if not case_ids:
        raise DataError(cohort.root, "cases", got="0 cases asked for", want="at least one")
    unknown = [DataError(i, "case", got="no such case", want="one of the cohort") for i in case_ids if i not in known]
    if unknown:
        raise DataError.merge(unknown)
    return [known[case_id] for case_id in case_ids]


def prediction_path(folder: Path, case_id: str) -> Path:
    """Return where the prediction of a case lies."""
    return as_stored(Path(folder), f"{case_id}.nii.gz")


def _units(p: NDArray, t: NDArray, scored: Sequence[int] | NDArray, aggregation: str) -> Iterator[tuple]:
    """Yield (slice number or None, prediction, truth) for everything that gets a score of its own."""
    if aggregation == "slice":
        yield from ((int(index), p[index], t[index]) for index in scored)
    elif len(scored):
        # Other slices are emptied, not cut out, so that distances between the scored ones stay what they are.
        kept = np.zeros_like(p)
        kept[scored] = p[scored]
        yield None, kept, t


def _find_labelled(cohort: Cohort, case_ids: Sequence[str]) -> list[Case]:
    cases = find_cases(cohort, case_ids)
    unlabelled = [case.case_id for case in cases if case.label is None]
    if unlabelled:
        want, hint = "a label to score against", "leave the case out of those to score"
        raise DataError.merge([DataError(i, "label", got="none", want=want, hint=hint) for i in unlabelled])
    return cases


def check_spacing(path: Path | None, volumes: Iterable[Volume | None]) -> None:
    """Refuse to measure anything in mm where the spacing of a volume, or its unit, cannot be believed.

    Raises:
        DataError: naming ``path``, the labels, and what is odd.
    """
    notes = [note.text for volume in volumes if volume is not None for note in volume.notes if note.field == "spacing"]
    if notes:
        raise DataError(
            path,
            "spacing",
            got=notes[0],
            want="a spacing that can be believed before mm and mL are computed from it",
            hint="correct the header, or pass accept_spacing=True if it is right",
        )


def values_beyond(labels: Labels, classes: int) -> list[int]:
    """Return the values of a label map that are no class id, which are those from 0 to ``classes`` - 1."""
    if not labels.size or 0 <= labels.min() <= labels.max() < classes:
        return []
    values = np.unique(labels)
    return values[(values < 0) | (values >= classes)].tolist()


def _of_classes(cohort: Cohort, prediction: Volume) -> Volume:
    """Return a prediction, if all its values are classes.

    Raises:
        DataError: some are not, as in masks of 0 and 255, or where label values were left as they were.
    """
    if beyond := values_beyond(prediction.voxels, len(cohort.class_names)):
        want = "class ids: " + ", ".join(f"{index} {name}" for index, name in enumerate(cohort.class_names))
        hint = "pass --label-values if predictions hold the label values of the cohort"
        raise DataError(prediction.path, "values", got=listed(map(str, beyond)), want=want, hint=hint)
    return prediction


class _Values:
    """The label values of predictions that show no target, but something that none of the cohort's label maps has.

    Where targets are chosen all other values are background, which would score such a prediction as an empty one.
    """

    def __init__(self, cohort: Cohort) -> None:
        self._targets = set(cohort.label_map or ()) if cohort.others_are_background else set()
        self._known: set[int] = {0}
        self._found: dict[Path | None, set[int]] = {}

    def note(self, prediction: Volume, raw: Volume) -> None:
        """Look at the values of a prediction and of the labels of its case."""
        self._known |= set(np.unique(raw.voxels).tolist())
        values = set(np.unique(prediction.voxels).tolist())
        if self._targets and not values & self._targets:
            self._found[prediction.path] = values

    def strangers(self) -> list[DataError]:
        """Return one error for each such prediction."""
        want = f"label values of the cohort, of which {listed(sorted(self._targets))} are targets"
        return [
            DataError(path, "values", got=listed(sorted(values - self._known)), want=want)
            for path, values in self._found.items()
            if values - self._known
        ]


def _read_prediction(path: Path, truth: Volume) -> tuple[Volume | None, str]:
    """Return the prediction, or None and what is wrong with it."""
    if not path.exists():
        return None, MISSING
    try:
        return read_labels(path, like=truth), OK
    except DataError as error:
        return None, f"unusable prediction: {error.field}"


def _score_or_fail(
    prediction: Labels | None,
    truth: Volume,
    labelled: NDArray,
    class_names: Sequence[str],
    conventions: Conventions,
    case: Case,
) -> list[Row]:
    """Score a prediction; without one, return a row of the worst scores for everything that would have had a row."""
    judged = np.zeros_like(truth.voxels) if prediction is None else prediction
    rows = score_case(
        judged,
        truth.voxels,
        truth.spacing_mm,
        class_names,
        conventions,
        case_id=case.case_id,
        patient=case.patient,
        labelled=labelled,
    )
    if prediction is not None:
        return rows
    first = 1 if conventions.aggregation == "slice" else 0
    worst = failure_metrics(truth.voxels.shape[first:], truth.spacing_mm[first:], conventions)
    return [
        replace(row, scores=worst, volumes=row.volumes and row.volumes._replace(prediction_ml=math.nan)) for row in rows
    ]


def _extra_predictions(pred_dir: Path, cohort: Cohort) -> list[str]:
    known = {case.case_id for case in cohort.cases}
    stems = (composed(path.name.removesuffix(".nii.gz")) for path in Path(pred_dir).glob("*.nii.gz"))
    return sorted(stem for stem in stems if stem not in known and not stem.startswith("."))
