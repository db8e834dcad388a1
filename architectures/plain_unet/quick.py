"""The cohort of the run of seconds that ``trifuse torture`` kills."""

from __future__ import annotations

from pathlib import Path

from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom
from trifuse.architectures.runs.demonstration import write_phantom


def write_quick_cohort(folder: Path) -> tuple[Path, Path]:
    """Write four tiny left atria and their split; return their paths."""
    return write_phantom(folder, lambda cohort: write_left_atrium_phantom(cohort, cases=4, size=(24, 24, 4)))
