"""log.csv: one row per epoch, written while a run trains, and read for its reports.

Every epoch stands there once, however often the run was cut short. Columns never change, unless a run is made to go on
with another recipe: those that come are then empty for the epochs before, and those that go for the epochs after.
What the network was before its first step lies beside it in start.json, by the names of the columns.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path

from trifuse.kernels.errors import CheckpointError, DataError

from .atomic_files import write_text
from .record import read_record, write_record
from .text import count, printable, read_table, read_text

START_FILE = "start.json"
_DIGEST_FILE, _SHA256 = "log.json", "log_sha256"  # of a checkpoint: of the rows before it
SMOOTHED = "_smoothed"  # ends the name of a score's moving average over epochs


class EpochLog:
    """Append rows to a CSV file.

    Args:
        path: of the CSV file. Its first column is ``epoch``, counted from 1; numbers have a decimal point everywhere.
        epochs_done: rows of later epochs, and a half-written last line, come from a run that was killed before its
            checkpoint; they are removed, since those epochs are run again.
        widen: let rows that are added have other columns than those before.
        digest: that of the rows that stay, see `read_digest`; None believes them.

    Raises:
        CheckpointError: the rows have another digest; the file is left as it is.
    """

    def __init__(self, path: Path, epochs_done: int, *, widen: bool = False, digest: str | None = None) -> None:
        self._path, self._widen = path, widen
        self._columns, kept = _keep_rows(path, epochs_done, digest)
        self._written = hashlib.sha256(kept.encode())
        self._size = path.stat().st_size if self._columns else 0
        self._waiting: list[bytes] = []

    def append(self, row: Mapping[str, float | int]) -> None:
        """Add an epoch; `write` brings it to the disk.

        Raises:
            DataError: its columns are not those of the rows before it.
        """
        if self._columns is None:
            self._columns = list(row)
            self._waiting.append(_line(self._columns))
        if self._widen:
            if not self._waiting:
                self._add_columns(row)
            row = {**dict.fromkeys(self._columns, math.nan), **row}
        if list(row) != self._columns:
            raise DataError(self._path, "columns", got=list(row), want=self._columns)
        self._waiting.append(_line([repr(value) for value in row.values()]))

    def _add_columns(self, row: Mapping[str, float | int]) -> None:
        """Put the columns that only a new row has behind those that are there, with empty cells."""
        assert self._columns is not None
        new = [name for name in row if name not in self._columns]
        if not new:
            return
        self._columns += new
        _, *before = read_text(self._path).splitlines()
        text = _line(self._columns).decode() + "".join(f"{line}{',' * len(new)}\n" for line in before)
        write_text(self._path, text)
        self._written = hashlib.sha256(text.encode())
        self._size = self._path.stat().st_size

    def write(self) -> None:
        """Bring all rows to the disk; after a failure, such as a full disk, the next call tries again.

        Raises:
            OSError: it did not work.
        """
        if self._waiting:
            content = b"".join(self._waiting)
            with open(self._path, "ab") as stream:
                stream.truncate(self._size)  # what a failed attempt left
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            self._size += len(content)
            self._written.update(content)
            self._waiting.clear()

    def write_digest(self, checkpoint: Path) -> None:
        """Write the SHA-256 of what is on the disk into the folder of a checkpoint."""
        write_record(checkpoint / _DIGEST_FILE, {_SHA256: self._written.hexdigest()})


def read_digest(checkpoint: Path) -> str | None:
    """Return what `write_digest` wrote; None for a checkpoint of an older version, which has none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = checkpoint / _DIGEST_FILE
    return read_record(path).get(_SHA256) if path.exists() else None


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a log, numbers as numbers; NaN where a cell is empty or holds none.

    Raises:
        DataError: the log is missing, has no rows, or no column called epoch.
    """
    try:
        _, rows = read_table(path)
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or error
        raise DataError(path, "log", got=got, want="the CSV log of a training run") from None
    if not rows or "epoch" not in rows[0]:
        got = "no rows" if not rows else f"columns {', '.join(map(str, rows[0]))}"
        raise DataError(path, "log", got=got, want="a column called epoch and at least one row")
    return [{name: _value(row.get(name)) for name in rows[0] if name} for row in rows]


def write_start(folder: Path, row: Mapping[str, float]) -> None:
    """Write what is known of a network before its first step, by column of the log; what is not finite is left out."""
    write_record(folder / START_FILE, {name: value for name, value in row.items() if math.isfinite(value)})


def read_start(folder: Path) -> dict[str, float]:
    """Return what `write_start` wrote; nothing for a run of an older version, which wrote none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / START_FILE
    if not path.exists():
        return {}
    row = read_record(path)
    if strange := [name for name, value in row.items() if type(value) not in (int, float)]:
        raise CheckpointError(f"{path}: expected numbers by column, got {row[strange[0]]!r} for {strange[0]!r}")
    return row


def _keep_rows(path: Path, epochs_done: int, digest: str | None) -> tuple[list[str] | None, str]:
    """Cut the file down to its header and the first epochs, and return the columns, and what is left."""
    try:
        lines = read_text(path).splitlines(keepends=True) if path.exists() else []
    except UnicodeDecodeError as error:
        raise DataError(path, "log", got=error, want="the CSV log of a training run", hint="restore it") from error
    whole = bool(lines) and lines[0].endswith("\n")
    kept = lines[: 1 + epochs_done] if whole else []
    text = "".join(kept)
    if epochs_done and digest not in (None, hashlib.sha256(text.encode()).hexdigest()):
        raise CheckpointError(
            f"{path}: expected {count(epochs_done, 'row')} as the run wrote them, got {max(len(kept) - 1, 0)} with "
            "another SHA-256; restore the file, or go on with what is there (--force-resume)"
        )
    if kept != lines and whole:
        write_text(path, text)
    elif not whole:
        path.unlink(missing_ok=True)
    return next(csv.reader(kept)) if whole else None, text


def _line(values: list[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return printable(line.getvalue()).encode()


def _value(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return math.nan
