"""The verdicts of `make virtual-gpu`: what came of every call of the GPU tests, run as compiled."""

from __future__ import annotations

import csv
from pathlib import Path

TABLE = Path(__file__).parents[1] / "verdicts" / "virtual_gpu.csv"
COLUMNS = ("operator", "dtype", "case", "verdict", "launches", "findings", "commit", "torch", "triton")
SOUND = "sound"


def read_verdicts(table: Path = TABLE) -> list[dict[str, str]]:
    """Return one row for each call: operator, dtype, case, verdict, launches, findings, commit, torch, triton."""
    with table.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def summary(table: Path = TABLE) -> str:
    """Return the verdicts in one line: how many calls are sound, in how many launches, of which versions and commit."""
    rows = read_verdicts(table)
    sound = [row for row in rows if row["verdict"] == SOUND]
    launches = sum(int(row["launches"]) for row in rows)
    made_of = {f"torch {row['torch']}, triton {row['triton']}, commit {row['commit']}" for row in rows}
    return f"{len(sound)} of {len(rows)} calls sound in {launches} launches ({'; '.join(sorted(made_of))})"
