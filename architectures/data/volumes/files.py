"""Which files hold volumes, known by their names alone; and what is to become of values that are no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trifuse.architectures.storage.file_names import as_stored, composed
from trifuse.kernels.errors import DataError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
IMAGE_SUFFIXES = (
    *(*NIFTI_SUFFIXES, ".gz", ".hdr", ".img", ".mha", ".mhd", ".mgz", ".nrrd", ".nhdr", ".dcm", ".npy", ".npz", ".h5"),
    *(".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"),
)
"""Endings of files that may be images, be they read or not; what has another lies beside images: sidecars, lists."""

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
    """Yield name without suffix, accents composed, and path of a folder's NIfTI files, sorted, without hidden ones."""
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in NIFTI_SUFFIXES if path.name.lower().endswith(suffix)), None)
        if suffix and not path.name.startswith("."):
            yield composed(path.name[: -len(suffix)]), path


def unread_images(folder: Path) -> list[DataError]:
    """Return a fault for each image of a folder in a format that is not read, so that no case is lost unseen."""
    hint = "convert it to NIfTI; or move it elsewhere, if it is no case"
    return [
        DataError(path, "file ending", got=path.name, want=" or ".join(NIFTI_SUFFIXES), hint=hint)
        for path in sorted(folder.iterdir())
        if path.name.lower().endswith(IMAGE_SUFFIXES)
        and not path.name.lower().endswith(NIFTI_SUFFIXES)
        and not path.name.startswith(".")
        and path.is_file()
    ]


def nifti_named(folder: Path, name: str) -> Path:
    """Return the path of the NIfTI file of that name, whichever its suffix; compressed where there is none.

    It may be alone in a folder of that name, as some programs unpack a compressed file.
    """
    paths = [as_stored(folder, f"{name}{suffix}") for suffix in NIFTI_SUFFIXES]
    unpacked = [file for path in paths if path.is_dir() for _, file in nifti_files(path)]
    found = [path for path in paths if path.is_file()] or (unpacked if len(unpacked) == 1 else paths)
    return found[0]
