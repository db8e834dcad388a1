"""PTB-XL as it is published: a table of records with folds that keep patients together; and folders without a table.

::

    ptbxl_database.csv                     ecg_id, patient_id, scp_codes, strat_fold, filename_lr, filename_hr ...
    records500/06000/06000_hr.hea, .dat    10 s at 500 Hz
    records100/06000/06000_lr.hea, .dat    the same at 100 Hz

Folds 1 to 8 train, 9 validates and 10 tests.

Source: Wagner et al., "PTB-XL, a large publicly available electrocardiography dataset", Scientific Data 7:154 (2020).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trifuse.architectures.storage.file_names import path_below
from trifuse.architectures.storage.text import count, listed, natural_key, read_table, repeated
from trifuse.kernels.errors import DataError

from .files import SUFFIXES

TABLE = "ptbxl_database.csv"
_COLUMNS = ("ecg_id", "patient_id", "scp_codes", "strat_fold", "filename_lr", "filename_hr")
_FOLDS = {"train": range(1, 9), "val": range(9, 10), "test": range(10, 11)}


@dataclass(frozen=True)
class PtbXlRecord:
    """One ECG of PTB-XL.

    Attributes:
        ecg_id: its number.
        path: of the WFDB record, without suffix.
        patient: whose it is.
        fold: 1 to 10.
        diagnoses: likelihood in percent of each SCP statement.
        age_years, sex: if the table knows them; 0 is male, 1 female.
    """

    ecg_id: int
    path: Path
    patient: str
    fold: int
    diagnoses: Mapping[str, float]
    age_years: float | None = None
    sex: int | None = None


@dataclass(frozen=True)
class PtbXl:
    """The records that are there, by number, and what is odd about the folder."""

    root: Path
    rate_hz: int
    records: tuple[PtbXlRecord, ...]
    notes: tuple[str, ...] = ()

    def part(self, name: Literal["train", "val", "test"]) -> tuple[PtbXlRecord, ...]:
        """Return the records of folds 1 to 8, 9 or 10."""
        return tuple(record for record in self.records if record.fold in _FOLDS[name])


def open_ptbxl(root: Path, rate_hz: int = 500) -> PtbXl:
    """Read the table of PTB-XL and find the records that are there.

    Args:
        root: folder with ``ptbxl_database.csv``.
        rate_hz: 500 or 100; a record that is not there at this rate is taken at the other, with a note.

    Raises:
        DataError: the table is missing, lacks columns, names a record twice, holds a line that cannot be read, or none
            of its records is there; or a patient is in more than one part. All problems are named at once.
    """
    root = Path(root)
    table = root / TABLE
    if rate_hz not in (100, 500):
        raise DataError(root, "rate_hz", got=rate_hz, want="500 or 100")
    records, problems, missing, other = [], [], 0, 0
    for line, row in enumerate(_rows(table), start=2):
        try:
            record = _record(root, row, rate_hz)
        except (ValueError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError) as error:
            got = str(error) or repr(error)
            problems.append(DataError(table, f"line {line}", got=got, want="numbers, and codes as a dictionary"))
            continue
        if record is None:
            missing += 1
            continue
        other += record.path.name.endswith("_lr") != (rate_hz == 100)
        records.append(record)
    problems += _contradictions(table, records)
    if problems:
        raise DataError.merge(problems)
    if not records:
        raise DataError(root, "records", got="none", want="the files that the table names", hint="download records500")
    notes = [f"{count(missing, 'record')} of the table not there"] if missing else []
    if other:
        notes.append(f"{count(other, 'record')} at {600 - rate_hz} Hz, not there at {rate_hz} Hz")
    return PtbXl(root, rate_hz, tuple(sorted(records, key=lambda record: record.ecg_id)), tuple(notes))


def find_ecgs(root: Path) -> list[Path]:
    """Return the ECGs of a folder and those below it, whatever their kind, numbers in names by value.

    Raises:
        DataError: there is none.
    """
    root = Path(root)
    found = [root] if root.is_file() else [path for path in root.rglob("*") if _is_ecg(path)]
    if not found:
        got = "no such folder" if not root.exists() else "none"
        raise DataError(root, "ECGs", got=got, want=f"files that end in {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda path: natural_key(path.as_posix()))


def _is_ecg(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.name not in (TABLE, "scp_statements.csv") and not path.name.startswith(".")


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        columns, rows = read_table(table)
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or str(error)
        raise DataError(table, "table", got=got, want="PTB-XL's table of records") from error
    if lacking := [column for column in _COLUMNS if column not in columns]:
        raise DataError(table, "columns", got=f"no {', '.join(lacking)}", want=", ".join(_COLUMNS))
    return rows


def _record(root: Path, row: Mapping[str, str], rate_hz: int) -> PtbXlRecord | None:
    """Return the record of a line; None if its files are not there."""
    names = [row["filename_hr"], row["filename_lr"]]
    paths = [path_below(root, name) for name in (names if rate_hz == 500 else names[::-1])]
    if None in paths:
        raise ValueError(f"a file that is not below the folder of {TABLE}: {listed(names)}")
    path = next((path for path in paths if path and path.with_name(path.name + ".hea").is_file()), None)
    fold = _whole(row["strat_fold"])
    if not 1 <= fold <= 10:
        raise ValueError(f"fold {fold}")
    codes = {str(code): float(likelihood) for code, likelihood in dict(ast.literal_eval(row["scp_codes"])).items()}
    age = float(row["age"]) if row.get("age") else None
    if age is not None and not math.isfinite(age):
        raise ValueError(f"age {age}")
    sex = _whole(row["sex"]) if row.get("sex") else None
    patient = str(_whole(row["patient_id"]))
    ecg_id = _whole(row["ecg_id"])
    return None if path is None else PtbXlRecord(ecg_id, path, patient, fold, codes, age, sex)


def _whole(text: str) -> int:
    """Read a whole number, which the table may write with a point; ``inf`` is none."""
    value = float(text)
    if not value.is_integer():
        raise ValueError(f"{text!r} where a whole number is expected")
    return int(value)


def _contradictions(table: Path, records: list[PtbXlRecord]) -> list[DataError]:
    problems = []
    if twice := sorted(repeated(record.ecg_id for record in records)):
        problems.append(DataError(table, "ecg_id", got=f"{listed(twice)} more than once", want="each once"))
    parts: dict[str, set[str]] = {}
    for record in records:
        name = next(name for name, folds in _FOLDS.items() if record.fold in folds)
        parts.setdefault(record.patient, set()).add(name)
    if torn := sorted((patient for patient, names in parts.items() if len(names) > 1), key=natural_key):
        want = "every patient in one part"
        problems.append(DataError(table, "strat_fold", got=f"patients {listed(torn)} in several parts", want=want))
    return problems
