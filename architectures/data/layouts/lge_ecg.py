"""LGE-MRI and ECG of the same patients, paired by a table.

``cases.csv`` has a line per case; paths are relative to its folder::

    case_id         name, unique
    lge_path        the LGE volume, a stack of short-axis slices
    seg_path        its labels: 0 background, 1 blood pool, 2 healthy myocardium, 3 scar; may be left out
    split           train, val, test or unused; left out everywhere, the cohort brings no split
    ecg_path        a 12-lead ECG in any form that ecg/files.py reads, or a median beat (12, 600)
    ecg_rate_hz     samples per second, where the file does not say
    mri_date        YYYY-MM-DD, and
    ecg_date        likewise; their distance counts, whichever came first
    rv_ant_x, rv_ant_y, rv_inf_x, rv_inf_y
                    where the right ventricle joins the left one's wall in front and below: voxel indices along the
                    two in-plane axes of the LGE file, in its own axis order

Only the first two are needed. A case without ``ecg_path`` or ``ecg_date`` has no ECG, and a note says so.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

from trifuse.architectures.storage.file_names import can_name_files, path_below
from trifuse.architectures.storage.text import listed, read_text, repeated
from trifuse.kernels.errors import DataError

from .cohort import Case, Clinical, Split
from .found import Classes, Found
from .layout import Layout, Option

TABLE = "cases.csv"
SCAR_CLASSES = ("background", "blood pool", "myocardium", "scar")
MAX_INTERVAL_DAYS = 90.0
_FIRST_DAY = date(1977, 7, 3)  # of the first MRI of a human being
"""Most days between ECG and MRI, unless the caller allows more."""

_PARTS = ("train", "val", "test", "unused")
_NEEDED = ("case_id", "lge_path")
_COLUMNS = (*_NEEDED, "split", "seg_path", "ecg_path", "ecg_rate_hz", "mri_date", "ecg_date")
_KNOWN = (*_COLUMNS, "rv_ant_x", "rv_ant_y", "rv_inf_x", "rv_inf_y")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_FILE_NAME = re.compile(r"[^/\\\x00-\x1f]+")


def scar_classes() -> Classes:
    """Return blood pool, myocardium and scar."""
    return Classes(SCAR_CLASSES, {value: value for value in range(len(SCAR_CLASSES))}, False)


def scan_scar_cohort(root: Path, max_interval_days: float | None = None) -> Found:
    """Read the table; what is wrong with any of its lines is collected.

    Args:
        root: folder of the table.
        max_interval_days: most days allowed between ECG and MRI; None allows `MAX_INTERVAL_DAYS`.

    Raises:
        DataError: the table cannot be read, or lacks a column that is needed.
    """
    allowed_days = MAX_INTERVAL_DAYS if max_interval_days is None else max_interval_days
    if not 0 <= allowed_days < math.inf:
        raise DataError(root, "max_interval_days", got=allowed_days, want="a number of days, 0 or more")
    path = root / TABLE
    header, lines = _read_table(path)
    notes, odd_dates, problems, cases = [], [], [], []
    if strangers := [name for name in header if name not in _KNOWN]:
        notes.append(f"{TABLE}: unknown columns {listed(strangers)}: not read")
    parts: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, cells in lines:
        if len(cells) != len(header):
            got = f"{len(cells)} cells: {listed(cells)}"
            problems.append(DataError(path, f"line {number}", got=got, want=f"{len(header)}, as in the first line"))
            continue
        line = _Line(path, number, dict(zip(header, cells, strict=True)), allowed_days)
        case = line.case(root)
        problems += line.problems
        notes += line.notes
        odd_dates += line.odd_dates
        if case is None:
            continue
        if (first := seen.setdefault(case.case_id, number)) != number:
            want = f"a name that line {first} does not have"
            problems.append(DataError(path, f"line {number}, case_id", got=case.case_id, want=want))
            continue
        cases.append(case)
        parts[case.case_id] = line.part()
    if odd_dates:
        why = "before there was MRI, or in the future; were the dates shifted?"
        notes.append(f"{TABLE}: dates that cannot be right, such as {listed(odd_dates)}: {why}")
    split, missing = _split(path, parts)
    return Found(cases, [*problems, *missing], split=split, notes=tuple(notes))


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the names of the columns, and number and cells of the lines that are not blank."""
    try:
        text = read_text(path)
    except OSError as error:
        raise DataError(path, "file", got=error.strerror, want="a table of cases") from error
    except UnicodeDecodeError as error:
        raise DataError(path, "encoding", got=f"byte {error.start} is none of it", want="UTF-8") from error
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))]
    header = [name.lower() for name in lines[0][1]] if lines else []
    absent = [name for name in _NEEDED if name not in header]
    double = sorted(repeated(header))
    if absent or double:
        got = f"no {' and no '.join(absent)}" if absent else f"{' and '.join(double)} more than once"
        hint = f"the first line names the columns, between commas or semicolons; known are {', '.join(_KNOWN)}"
        raise DataError(path, "columns", got=got, want=f"{' and '.join(_NEEDED)}, each column once", hint=hint)
    return header, lines[1:]


@dataclass
class _Line:
    """A line of the table, and what is wrong with it or odd about it."""

    path: Path
    number: int
    cells: Mapping[str, str]
    max_interval_days: float
    problems: list[DataError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    odd_dates: list[str] = field(default_factory=list)

    def case(self, root: Path) -> Case | None:
        """Return the case, None without image or usable name; what cannot be understood is left out and a problem."""
        name = self.cells["case_id"]
        if not _FILE_NAME.fullmatch(name) or name.startswith("."):
            self._refuse("case_id", want="a name that can be a file's")
        image = self._file(root, "lge_path")
        if image is None and not self.cells["lge_path"]:
            self._refuse("lge_path", want="path of the LGE volume")
        ecg, rate, days = self._ecg(root)
        anterior, inferior = self._landmark("rv_ant_x", "rv_ant_y"), self._landmark("rv_inf_x", "rv_inf_y")
        label = self._file(root, "seg_path")
        clinical = Clinical(ecg, rate, days, anterior, inferior)
        return None if image is None or not can_name_files(name) else Case(name, name, image, label, clinical=clinical)

    def part(self) -> str:
        """Return the part of the split, empty if none is named."""
        return self.cells.get("split", "").lower()

    def _refuse(self, column: str, *, want: str, got: object = None, hint: str = "") -> None:
        where = f"line {self.number}, case {self.cells['case_id'] or 'without a name'}: {column}"
        got = self.cells.get(column) or "nothing" if got is None else got
        self.problems.append(DataError(self.path, where, got=got, want=want, hint=hint))

    def _file(self, root: Path, column: str) -> Path | None:
        name = self.cells.get(column, "")
        if not name:
            return None
        path = path_below(root, name)
        if path is None:
            self._refuse(column, want=f"a path below the folder of {TABLE}")
        return path

    def _ecg(self, root: Path) -> tuple[Path | None, float | None, float | None]:
        """Return ECG file, rate and interval."""
        file, mri, ecg = self._file(root, "ecg_path"), self._date("mri_date"), self._date("ecg_date")
        rate = self._number("ecg_rate_hz")
        if rate is not None and rate <= 0:
            self._refuse("ecg_rate_hz", want="samples per second, above 0")
        if absent := [name for name in ("ecg_path", "ecg_date") if not self.cells.get(name)]:
            if len(absent) == 1 or self.cells.get("mri_date"):
                self.notes.append(f"{TABLE}: case {self.cells['case_id']} has no {' and no '.join(absent)}: no ECG")
            return None, None, None
        if not self.cells.get("mri_date"):
            self._refuse("mri_date", want="YYYY-MM-DD: the case has an ECG")
        days = None if mri is None or ecg is None else float(abs((mri - ecg).days))
        if days is not None and days > self.max_interval_days:
            got = f"{days:g} days between ecg_date {ecg} and mri_date {mri}"
            hint = "correct a date, leave ecg_date empty, or allow more with max_interval_days"
            self._refuse("interval", got=got, want=f"one in [0, {self.max_interval_days:g}] days", hint=hint)
        return file, rate, days

    def _date(self, column: str) -> date | None:
        text = self.cells.get(column, "")
        try:
            if text and not _DATE.fullmatch(text):
                raise ValueError("another form")
            day = date.fromisoformat(text) if text else None
        except ValueError:
            self._refuse(column, want="a date as YYYY-MM-DD")
            return None
        if day is not None and not _FIRST_DAY <= day <= date.today() + timedelta(days=1):
            self.odd_dates.append(f"case {self.cells['case_id']}, {column} {day}")
        return day

    def _number(self, column: str) -> float | None:
        text = self.cells.get(column, "")
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        self._refuse(column, want="a finite number, with a decimal point, or nothing")
        return None

    def _landmark(self, x_column: str, y_column: str) -> tuple[float, float] | None:
        given = [bool(self.cells.get(column)) for column in (x_column, y_column)]
        x, y = self._number(x_column), self._number(y_column)
        if given[0] != given[1]:
            self._refuse(y_column if given[0] else x_column, want=f"both {x_column} and {y_column}, or neither")
        return None if x is None or y is None else (x, y)


def _split(path: Path, parts: Mapping[str, str]) -> tuple[Split | None, list[DataError]]:
    """Collect the cases of each part; None if no line names one."""
    if not any(parts.values()):
        return None, []
    want = f"one of {', '.join(_PARTS)}; or nothing in all lines"
    problems = [
        DataError(path, f"case {case_id}: split", got=part or "nothing", want=want)
        for case_id, part in parts.items()
        if part not in _PARTS
    ]
    ids = {part: tuple(case_id for case_id, chosen in parts.items() if chosen == part) for part in _PARTS}
    return None if problems else Split(**ids), problems


LAYOUT = Layout(
    name="lge_ecg",
    summary="LGE volumes and ECGs of the same patients, paired by a table",
    signs=TABLE,
    detect=lambda root: (root / TABLE).is_file(),
    scan=lambda root, values: scan_scar_cohort(root, values["max_interval_days"]),
    lacking=f"lines in {TABLE}",
    classes=lambda root, values: scar_classes(),
    options=(
        Option(
            "data.max_interval_days",
            "--max-interval",
            f"largest number of days between ECG and MRI ({MAX_INTERVAL_DAYS:g})",
            {"type": float, "metavar": "DAYS"},
        ),
    ),
)
