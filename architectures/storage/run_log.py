"""Reading ``log.csv``, the one row per epoch that training writes and reports are made from."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from trifuse.kernels.errors import DataError

SMOOTHED = "_smoothed"  # ends the name of a score's moving average over epochs


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a log, numbers as numbers; NaN where a cell is empty or holds none.

    Raises:
        DataError: the log is missing, has no rows, or no column called epoch.
    """
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise DataError(path, "log", got=error.strerror, want="the CSV log of a training run") from None
    if not rows or "epoch" not in rows[0]:
        got = "no rows" if not rows else f"columns {', '.join(map(str, rows[0]))}"
        raise DataError(path, "log", got=got, want="a column called epoch and at least one row")
    return [{name: _value(row.get(name)) for name in rows[0] if name} for row in rows]


def _value(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return math.nan
