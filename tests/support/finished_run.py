"""What shows that a run has finished, without one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts.split import write_split
from trifuse.architectures.runs.prepared_data import open_split
from trifuse.architectures.runs.results import RESULTS_FILE, describe_results
from trifuse.architectures.storage.record import write_record


def mark_finished(run: Path, recipe: Any) -> None:
    """Write what `has_finished` looks for."""
    if recipe.data.split is not None:
        shutil.copy(recipe.data.split, run / "split.json")
    cohort, split = open_split(recipe.data, run)
    write_split(run / "split.json", split, sealed=True)
    write_record(run / RESULTS_FILE, describe_results(recipe, cohort, split, ("test",), {}))
    (run / "report.md").touch()
