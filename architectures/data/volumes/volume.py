"""A volume in memory: its voxels as they are shown, the grid they came from, and what was odd about their file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trifuse.kernels.errors import DataError

from .geometry import Geometry, grid_distance_vox

GRID_TOLERANCE_VOX = 0.01
"""Two grids are the same if no corner lies further apart than this, in voxels of the finest axis ..."""
GRID_LIMIT_VOX = 0.5
"""... and are taken for the same, with a note, up to this."""


@dataclass(frozen=True)
class Note:
    """Something odd about a file that does not make it unusable: which field, and a sentence."""

    field: str
    text: str


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels of shape (D, H, W) with the spacing of these three axes in millimetres, and the grid they came from."""

    voxels: np.ndarray
    spacing_mm: tuple[float, float, float]
    geometry: Geometry
    path: Path | None = None
    notes: tuple[Note, ...] = ()

    @property
    def affine_mm(self) -> np.ndarray:
        """The affine of the voxels as they are shown, in mm whatever the file's unit."""
        affine = self.geometry.display_affine
        affine[:3] *= self.spacing_mm[0] / np.linalg.norm(affine[:3, 0])
        return affine


@dataclass(frozen=True)
class StoredSize:
    """How large an image is, as its file says before a voxel is read.

    Attributes:
        shape: (D, H, W), as it will be shown.
        spacing_mm: of these axes.
        stored_bytes: its file's, decompressed.
        scaled: whether stored values are multiplied or shifted, which takes float64.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    stored_bytes: int
    scaled: bool = False


def match_grids(path: Path, geometry: Geometry, like: Volume) -> tuple[Geometry, tuple[Note, ...]]:
    """Return the geometry that shows the volume of ``path`` as ``like`` is shown, with a note if it lies a little off.

    Raises:
        DataError: the two do not share one grid: another shape, or corners more than half a voxel away; or one is of
            several frames, and the image has another number of them.
    """
    image = like.geometry
    if (
        geometry.shape == image.shape
        and grid_distance_vox(image.affine, geometry.affine, image.shape) <= GRID_LIMIT_VOX
    ):
        geometry = replace(geometry, axes=image.axes, flips=image.flips)
    if geometry.display_shape != image.display_shape:
        raise DataError(
            path,
            "shape",
            got=f"{geometry.display_shape} (slices, rows, columns)",
            want=f"{image.display_shape}, as {like.path}",
            hint="the labels belong to another image, or were resampled",
        )
    if geometry.frames not in (1, image.frames):
        want = f"one, or {image.frames} as {like.path}"
        raise DataError(path, "frames", got=geometry.frames, want=want, hint="the frames would not be the image's")
    distance = grid_distance_vox(image.display_affine, geometry.display_affine, image.display_shape)
    if distance > GRID_LIMIT_VOX:
        raise DataError(
            path,
            "affine",
            got=f"corners {distance:.3g} voxels away from those of {like.path}",
            want=f"at most {GRID_LIMIT_VOX} voxels",
            hint="the labels belong to another image, or their header was lost",
        )
    if distance > GRID_TOLERANCE_VOX:
        text = f"corners {distance:.3g} voxels away from those of the image: taken for the same grid"
        return geometry, (Note("affine", text),)
    return geometry, ()
