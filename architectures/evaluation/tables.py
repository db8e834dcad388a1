"""Scores and summaries on disk: CSV that any locale reads alike, the conventions in each line.

Tables are written whole or not at all, and what is read back is checked before anything is compared with it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from trifuse.architectures.storage.atomic_files import write_text
from trifuse.architectures.storage.file_names import composed
from trifuse.architectures.storage.text import listed, read_table, repeated
from trifuse.kernels import DataError

from .metrics import EMPTY_MASK_SCORES, Conventions
from .scoring import Row
from .summary import Scored

_FIXED_COLUMNS = ("case_id", "patient", "class_name", "slice", "status")
_LAST_COLUMN = "conventions"


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


def is_case_table(path: Path) -> bool:
    """Tell whether a file has the columns of a case table."""
    try:
        columns, _ = read_table(path)
    except (OSError, ValueError):
        return False
    return columns[: len(_FIXED_COLUMNS)] == [*_FIXED_COLUMNS]


def read_case_table(path: Path) -> list[Row]:
    """Read what `write_case_table` wrote.

    Raises:
        DataError: the file is missing, empty, no such table, mixes conventions, or holds a cell that is no number.
    """
    try:
        _, lines = read_table(path)
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or error
        raise DataError(
            path, "case table", got=got, want="a CSV table written by evaluate, or a run's folder"
        ) from None
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
    rows = [_parse(path, number_, line, conventions) for number_, line in enumerate(lines, start=2)]
    if twice := repeated(" ".join(filter(None, (row.case_id, row.class_name, _slice(row)))) for row in rows):
        want = "a row for each case, class and slice: one table, not several in one file"
        raise DataError(path, "rows", got=f"{listed(twice)} more than once", want=want)
    return rows


def case_tables(run: Path) -> list[Path]:
    """Find the case tables of a run's headline, one per convention, that of the headline first.

    Raises:
        DataError: there is none.
    """
    for part in ("test", "val", "train"):
        first = run / f"{part}_cases.csv"
        if first.exists():
            others = (run / f"{part}_{word}_cases.csv" for word in EMPTY_MASK_SCORES)
            return [first, *filter(Path.exists, others)]
    runs = sorted(path.name for path in run.glob("run_*") if path.is_dir())
    hint = f"choose one of its runs: {listed(runs)}" if runs else ""
    raise DataError(run, "case table", got="none", want="test_cases.csv, as trifuse train writes it", hint=hint)


def write_summary_table(path: Path, scored: Sequence[Scored]) -> None:
    """Write summaries under one or several conventions as CSV, atomically, the conventions in each line."""
    header = ["class_name", "metric", "mean", "sd", "count", "undefined", "low", "high", "level", "patients", "drawn"]
    lines = (
        [
            *(s.class_name, s.metric, number(s.mean), number(s.sd), s.count, s.undefined),
            *(number(s.low), number(s.high), number(s.level), s.patients, s.drawn, one.conventions.label),
        ]
        for one in scored
        for s in one.summaries
    )
    write_csv(path, [*header, _LAST_COLUMN], lines)


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


def _slice(row: Row) -> str:
    return "" if row.slice is None else f"slice {row.slice}"


def _parse(path: Path, line_number: int, line: dict[str, str], conventions: Conventions) -> Row:
    try:
        scores = {metric: float(line[metric]) for metric in conventions.metrics}
        index = int(line["slice"]) if line["slice"] else None
    except (TypeError, ValueError) as error:
        raise DataError(
            path, f"line {line_number}", got=error, want="numbers with a decimal dot", hint="write it again"
        ) from None
    return Row(
        composed(line["case_id"]),
        composed(line["patient"]),
        line["class_name"],
        index,
        line["status"],
        scores,
        conventions,
    )
