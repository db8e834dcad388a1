"""Files by their names: which hold volumes, and which names a file may give to another; values that are no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

NIFTI_SUFFIXES = (".nii.gz", ".nii")

_LONGEST_NAME = 240  # in bytes: most file systems take 255, the ending included

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


def path_below(root: Path, name: str) -> Path | None:
    """Return the path of a file that another file names, with either system's separators; None if it leaves the folder.

    What counts is how the name is written: links that lie in the folder are followed.
    """
    path = PurePosixPath(PureWindowsPath(name).as_posix())
    if not path.parts or path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or "\0" in name:
        return None
    return root / path


def can_name_files(name: str) -> bool:
    """Tell whether a file can be called so, an ending behind it, and lie where it is meant to: results of a case do."""
    controls = any(ord(character) < ord(" ") for character in name)
    short = len(name.encode("utf-8", "surrogateescape")) <= _LONGEST_NAME
    return short and not controls and not set(name) & set("/\\") and name not in ("", ".", "..")
