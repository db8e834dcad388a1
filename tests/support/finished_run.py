"""What shows that a run has finished, without one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.run_description import describe_recipe
from trifuse.architectures.storage.record import write_record


def mark_finished(run: Path, recipe: Any) -> None:
    """Write what `has_finished` looks for."""
    write_record(run / "recipe.json", describe_recipe(recipe))
    if recipe.data.split is not None:
        shutil.copy(recipe.data.split, run / "split.json")
    (run / "report.md").touch()
