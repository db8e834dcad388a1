"""Per-case score tables: made from a folder of predictions, written as CSV, read back, and summarised."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.files import write_text
from trifuse.kernels import DataError

from .metrics import MM3_PER_ML, Conventions, case_metrics, failure_metrics

if TYPE_CHECKING:
    from trifuse.architectures.data.cases import Case, Study
    from trifuse.architectures.data.volume import Volume

OK = "ok"
MISSING = "missing prediction"
EXTRA = "extra prediction"
NOTHING_LABELLED = "no labelled slice"
MEAN_OF_CLASSES = "mean of classes"

METRIC_NAMES = {
    "dsc": "DSC",
    "iou": "IoU",
    "precision": "Precision",
    "sensitivity": "Sensitivity",
    "volume_difference_ml": "Volume difference, mL",
    "volume_difference_relative": "Volume difference, share",
    "hd95_mm": "HD95, mm",
    "hd95_vox": "HD95, voxels",
}

_FIXED_COLUMNS = ("case_id", "patient", "class_name", "slice", "status")
_LAST_COLUMN = "conventions"

Labels = NDArray[np.integer]


@dataclass(frozen=True)
class Row:
    """The scores of one class in one case, or in one slice of it (``slice`` counts from 0)."""

    case_id: str
    patient: str
    class_name: str
    slice: int | None
    status: str
    scores: dict[str, float]
    conventions: Conventions

    @property
    def failed(self) -> bool:
        """Whether the scores stand for a prediction that was missing, unreadable or of no known case."""
        return self.status not in (OK, NOTHING_LABELLED)


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n - 1 in the denominator; NaN for one) of one score of one class.

    ``count`` scores went in; ``undefined`` more were NaN under the convention and did not.
    """

    class_name: str
    metric: str
    mean: float
    sd: float
    count: int
    undefined: int


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
    """
    rows = []
    if conventions.slices == "all":
        labelled = range(len(truth))
    elif labelled is None:
        labelled = np.flatnonzero((truth != 0).any((1, 2)))
    for class_id, class_name in enumerate(class_names[1:], start=1):
        for index, p, t in _units(prediction == class_id, truth == class_id, labelled, conventions.aggregation):
            spacing = spacing_mm[-t.ndim :]
            scores = case_metrics(p, t, spacing, conventions, voxel_ml=math.prod(spacing_mm) / MM3_PER_ML)
            rows.append(Row(case_id, patient, class_name, index, OK, scores, conventions))
    if not rows:
        undefined = dict.fromkeys(conventions.metrics, math.nan)
        rows = [Row(case_id, patient, name, None, NOTHING_LABELLED, undefined, conventions) for name in class_names[1:]]
    return rows


def evaluate_cases(
    pred_dir: Path,
    study: Study,
    case_ids: Sequence[str],
    conventions: Conventions | None = None,
    *,
    accept_spacing: bool = False,
) -> list[Row]:
    """Score ``<case_id>.nii.gz`` of a folder against the labels of a study, reading one case at a time.

    Nothing is dropped: a prediction that is missing, unreadable or on another grid gets the worst scores, and so does
    a file of the folder that belongs to no case of the study. Files of the study's other cases are left alone.

    Args:
        pred_dir: folder of predicted class ids, as `predict_cases` writes them.
        study: where the labels are.
        case_ids: the cases to score.
        conventions: how to score; by default strict, one score per volume.
        accept_spacing: score even where the reader found a spacing, or its unit, hard to believe.

    Raises:
        DataError: no case is asked for, a case is unknown or has no label, a label cannot be read, or a spacing is
            hard to believe; all such problems at once.
    """
    from trifuse.architectures.data.cases import load_raw_case, map_labels

    conventions = conventions or Conventions()
    rows: list[Row] = []
    problems: list[DataError] = []
    for case in _find_labelled(study, case_ids):
        try:
            image, raw = load_raw_case(case, nonfinite="zero")
            assert raw is not None  # `_find_labelled` has seen to it
            if not accept_spacing:
                _check_spacing(case, (image, raw))
            truth = map_labels(study, raw)
        except DataError as error:
            problems.append(error)
            continue
        prediction, status = _read_prediction(prediction_path(pred_dir, case.case_id), truth)
        labelled = np.flatnonzero((raw.voxels != 0).any((1, 2)))
        scored = _score_or_fail(prediction, truth, labelled, study.class_names, conventions, case)
        rows += scored if status == OK else [replace(row, status=status) for row in scored]
    if problems:
        raise DataError.merge(problems)
    worst = failure_metrics(None, None, conventions)
    for stem in _extra_predictions(pred_dir, study):
        rows += [Row(stem, stem, name, None, EXTRA, worst, conventions) for name in study.class_names[1:]]
    return rows


def find_cases(study: Study, case_ids: Sequence[str]) -> list[Case]:
    """Return the cases of these names.

    Raises:
        DataError: no name is given, or some belong to no case of the study; all of them are listed.
    """
    known = {case.case_id: case for case in study.cases}
    if not case_ids:
        raise DataError(study.root, "cases", got="0 cases asked for", want="at least one")
    unknown = [DataError(i, "case", got="no such case", want="one of the study") for i in case_ids if i not in known]
    if unknown:
        raise DataError.merge(unknown)
    return [known[case_id] for case_id in case_ids]


def prediction_path(folder: Path, case_id: str) -> Path:
    """Return where the prediction of a case lies."""
    return Path(folder) / f"{case_id}.nii.gz"


def write_case_table(path: Path, rows: Sequence[Row]) -> None:
    """Write one line per row as CSV, atomically, decimals with a dot in any locale, the conventions in each line."""
    metrics = rows[0].conventions.metrics
    lines = (
        [
            row.case_id,
            row.patient,
            row.class_name,
            "" if row.slice is None else row.slice,
            row.status,
            *(number(row.scores[metric]) for metric in metrics),
            row.conventions.label,
        ]
        for row in rows
    )
    write_csv(path, [*_FIXED_COLUMNS, *metrics, _LAST_COLUMN], lines)


def read_case_table(path: Path) -> list[Row]:
    """Read what `write_case_table` wrote.

    Raises:
        DataError: the file is missing, empty, no such table, mixes conventions, or holds a cell that is no number.
    """
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            lines = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, "case table", got=error, want="a CSV table written by evaluate") from None
    if not lines:
        raise DataError(path, "case table", got="no rows", want="at least one scored case")
    labels = sorted({line.get(_LAST_COLUMN) or "" for line in lines})
    if len(labels) > 1:
        raise DataError(path, _LAST_COLUMN, got=f"{len(labels)} of them: {labels}", want="one per table")
    try:
        conventions = Conventions.from_label(labels[0])
    except ValueError as error:
        raise DataError(path, _LAST_COLUMN, got=error, want="the last column of a table written by evaluate") from None
    absent = [column for column in (*_FIXED_COLUMNS, *conventions.metrics) if lines[0].get(column) is None]
    if absent:
        raise DataError(path, "columns", got=f"none called {', '.join(absent)}", want="a table written by evaluate")
    return [_parse(path, number_, line, conventions) for number_, line in enumerate(lines, start=2)]


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Return mean and SD over the rows for each class and score, and the mean of the classes' means if there are many.

    NaN scores, undefined under the convention, are left out of the mean and counted. The SD beside the mean of the
    classes is that of the units' own means over their classes.
    """
    summaries = []
    for class_name in dict.fromkeys(row.class_name for row in rows):
        of_class = [row for row in rows if row.class_name == class_name]
        for metric in of_class[0].scores:
            summaries.append(_summary(class_name, metric, [row.scores[metric] for row in of_class]))
    if len({row.class_name for row in rows}) > 1:
        for metric in rows[0].scores:
            mean = mean_of_defined([s.mean for s in summaries if s.metric == metric])
            of_units = _summary(MEAN_OF_CLASSES, metric, list(_class_means(rows, metric)))
            summaries.append(replace(of_units, mean=mean))
    return summaries


def mean_of_defined(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if all are."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def write_summary_table(path: Path, summaries: Sequence[Summary], conventions: Conventions) -> None:
    """Write the summary as CSV, atomically, the conventions in each line."""
    lines = (
        [s.class_name, s.metric, number(s.mean), number(s.sd), s.count, s.undefined, conventions.label]
        for s in summaries
    )
    write_csv(path, ["class_name", "metric", "mean", "sd", "count", "undefined", _LAST_COLUMN], lines)


def summary_cells(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Return header and readable cells of a summary, one line per class, for a terminal or a report."""
    metrics = list(dict.fromkeys(s.metric for s in summaries))
    lines = []
    for class_name in dict.fromkeys(s.class_name for s in summaries):
        of_class = {s.metric: s for s in summaries if s.class_name == class_name}
        n = max(s.count + s.undefined for s in of_class.values())
        cells = [f"{format_score(s.mean, s.metric)} ± {format_score(s.sd, s.metric)}" for s in of_class.values()]
        lines.append([class_name, str(n), *cells])
    return ["Mean ± SD", "n", *(METRIC_NAMES[metric] for metric in metrics)], lines


def undefined_scores(summaries: Sequence[Summary]) -> list[str]:
    """Return a sentence for each score of which some values were undefined and left out."""
    return [
        f"{METRIC_NAMES[s.metric]} of {s.class_name}: {s.undefined} of {s.count + s.undefined} undefined and left out "
        "of the mean."
        for s in summaries
        if s.undefined
    ]


def failures(rows: Sequence[Row]) -> list[str]:
    """Return the cases whose scores stand for a failed prediction, with the reason: ``case_3 (missing prediction)``."""
    return sorted({f"{row.case_id} ({row.status})" for row in rows if row.failed})


def format_summary(summaries: Sequence[Summary], conventions: Conventions) -> str:
    """Return a summary as text: the conventions, aligned columns, and what was left out."""
    return "\n".join([conventions.describe(), "", *aligned(*summary_cells(summaries)), *undefined_scores(summaries)])


def format_score(value: float, metric: str) -> str:
    """Return a score as people read it: three decimals, two if it has a unit, a dash if it is undefined."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if metric.endswith(("_ml", "_mm", "_vox")) else f"{value:.3f}"


def aligned(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of text in columns."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [header, *cells])
    return ["  ".join(line).rstrip() for line in padded]


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Write a CSV file atomically: UTF-8, commas, a bare newline, cells as they are given."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    write_text(Path(path), text.getvalue())


def number(value: float) -> str:
    """Return the shortest text that reads back as the same float; never a decimal comma."""
    return repr(float(value))


def _units(p: NDArray, t: NDArray, scored: Sequence[int] | NDArray, aggregation: str) -> Iterator[tuple]:
    """Yield (slice number or None, prediction, truth) for everything that gets a score of its own."""
    if aggregation == "slice":
        yield from ((int(index), p[index], t[index]) for index in scored)
    elif len(scored):
        # Other slices are emptied, not cut out, so that distances between the scored ones stay what they are.
        kept = np.zeros_like(p)
        kept[scored] = p[scored]
        yield None, kept, t


def _find_labelled(study: Study, case_ids: Sequence[str]) -> list[Case]:
    cases = find_cases(study, case_ids)
    unlabelled = [case.case_id for case in cases if case.label is None]
    if unlabelled:
        raise DataError.merge([DataError(i, "label", got="none", want="a label to score against") for i in unlabelled])
    return cases


def _check_spacing(case: Case, volumes: Iterable[Volume | None]) -> None:
    notes = [note.text for volume in volumes if volume is not None for note in volume.notes if note.field == "spacing"]
    if notes:
        raise DataError(
            case.label,
            "spacing",
            got=notes[0],
            want="a spacing that can be believed before mm and mL are computed from it",
            hint="correct the header, or pass accept_spacing=True if it is right",
        )


def _read_prediction(path: Path, truth: Volume) -> tuple[Labels | None, str]:
    """Return the predicted class ids, or None and what is wrong with them."""
    from trifuse.architectures.data.nifti import read_labels

    if not path.exists():
        return None, MISSING
    try:
        return read_labels(path, like=truth).voxels, OK
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
    return [replace(row, scores=worst) for row in rows]


def _extra_predictions(pred_dir: Path, study: Study) -> list[str]:
    known = {case.case_id for case in study.cases}
    stems = (path.name.removesuffix(".nii.gz") for path in Path(pred_dir).glob("*.nii.gz"))
    return sorted(stem for stem in stems if stem not in known and not stem.startswith("."))


def _parse(path: Path, line_number: int, line: dict[str, str], conventions: Conventions) -> Row:
    try:
        scores = {metric: float(line[metric]) for metric in conventions.metrics}
        index = int(line["slice"]) if line["slice"] else None
    except (TypeError, ValueError) as error:
        raise DataError(
            path, f"line {line_number}", got=error, want="numbers with a decimal dot", hint="write it again"
        ) from None
    return Row(line["case_id"], line["patient"], line["class_name"], index, line["status"], scores, conventions)


def _class_means(rows: Sequence[Row], metric: str) -> Iterator[float]:
    units: dict[tuple[str, int | None], list[float]] = {}
    for row in rows:
        units.setdefault((row.case_id, row.slice), []).append(row.scores[metric])
    yield from map(mean_of_defined, units.values())


def _summary(class_name: str, metric: str, scores: Sequence[float]) -> Summary:
    defined = np.array([score for score in scores if not math.isnan(score)], dtype=float)
    mean = float(defined.mean()) if defined.size else math.nan
    sd = float(defined.std(ddof=1)) if defined.size > 1 else math.nan
    return Summary(class_name, metric, mean, sd, int(defined.size), len(scores) - int(defined.size))
