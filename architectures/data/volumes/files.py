"""Which files hold volumes, known by their names alone; and what is to become of values that are no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

NIFTI_SUFFIXES = (".nii.gz", ".nii")

NonFinite = Literal["error", "zero", "median"]
"""What to do with NaN and infinite voxels: refuse the file, or put zero or the median of the others in their place."""


@dataclass(frozen=True)
class Arrays:
    """Where a volume lies: one file with arrays (D, H, W), or one file with arrays (H, W) for every slice.

    Attributes:
        files: one file, or those of the slices in their order.
        image_key: name of the image's array in each file.
        label_key: name of the labels' array.
        sliced: whether every file is one slice.
    """

    files: tuple[Path, ...]
    image_key: str = "image"
    label_key: str = "label"
    sliced: bool = False


def nifti_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name without suffix and path of the NIfTI files of a folder, sorted; hidden files are left out."""
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in NIFTI_SUFFIXES if path.name.lower().endswith(suffix)), None)
        if suffix and not path.name.startswith("."):
            yield path.name[: -len(suffix)], path
