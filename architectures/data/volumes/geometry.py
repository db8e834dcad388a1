"""Where a volume lies in the world, and how its native axes are shown.

Axes are swapped and flipped, never resampled, so that what is shown goes back to the native grid exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.kernels.errors import DataError

# For each world axis that the slices may follow: the world axes (0 R, 1 A, 2 S) of slices, rows and columns, and which
# way they run. Rows and columns run to the left, the back and the feet, as on a radiologist's screen.
_DISPLAY = {
    2: ((2, +1), (1, -1), (0, -1)),  # axial
    1: ((1, -1), (2, -1), (0, -1)),  # coronal
    0: ((0, -1), (2, -1), (1, -1)),  # sagittal
}

_COMPUTABLE_LENGTHS = (1e-12, 1e12)  # of a voxel's edge, in any unit: beyond them products leave the floating point


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where a volume lies, and how its native axes are shown.

    Attributes:
        shape: native shape, in the file's axis order.
        affine: native voxel index to world, (4, 4) float64, right-anterior-superior, in the file's unit.
        axes: the native axis that is shown as slices, rows and columns.
        flips: whether slices, rows and columns run against their native axis.
        header: the geometry fields of the file's header, and nothing else of it.
        dimensions: as many as the file has: 2 of an image that is one slice of no thickness, else 3.
        frames: how many volumes the file has: more than 1 of one of four dimensions.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    header: Any = field(repr=False)
    dimensions: int = 3
    frames: int = 1

    def to_display(self, native: np.ndarray) -> np.ndarray:
        """Return the view (D, H, W) of an array in native axis order."""
        shown = native.transpose(self.axes)
        return shown[tuple(slice(None, None, -1 if flip else None) for flip in self.flips)]

    def to_native(self, shown: np.ndarray) -> np.ndarray:
        """Return the view in native axis order of an array (D, H, W); the inverse of ``to_display``."""
        straight = shown[tuple(slice(None, None, -1 if flip else None) for flip in self.flips)]
        return straight.transpose(np.argsort(self.axes))

    def display_point(self, point: tuple[float, float]) -> tuple[float, float]:
        """Return the (row, column) at which a point of a slice is shown.

        Args:
            point: indices (x, y) on the two native axes that are no slices, in the file's axis order.
        """
        at = dict(zip(sorted(self.axes[1:]), point, strict=True))
        row, column = (
            self.shape[axis] - 1 - at[axis] if flip else at[axis]
            for axis, flip in zip(self.axes[1:], self.flips[1:], strict=True)
        )
        return row, column

    @property
    def display_affine(self) -> np.ndarray:
        """The affine of the array (D, H, W) as it is shown."""
        affine = self.affine.copy()
        for column, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            step = self.affine[:3, axis]
            affine[:3, column] = -step if flip else step
            if flip:
                affine[:3, 3] += step * (self.shape[axis] - 1)
        return affine

    @property
    def plane(self) -> str:
        """The plane of the body in which slices lie most nearly: sagittal, coronal or axial."""
        return ("sagittal", "coronal", "axial")[int(np.abs(self.affine[:3, self.axes[0]]).argmax())]

    @property
    def display_shape(self) -> tuple[int, int, int]:
        """The shape (D, H, W) as it is shown."""
        depth, height, width = (self.shape[axis] for axis in self.axes)
        return depth, height, width


def grid_distance_vox(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """Return how far apart two affines put the corners of a grid, at most, in voxels of the finest axis."""
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    finest = np.linalg.norm(first[:3, :3], axis=0).min()
    return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max() / finest)


def axis_lengths(path: Path, name: str, affine: np.ndarray) -> np.ndarray:
    """Return the lengths of a voxel's edges, in the affine's unit.

    Raises:
        DataError: the field ``name`` of the file holds an affine whose axes are not finite, do not span a space, or
            are too short or too long to compute with.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    shortest, longest = _COMPUTABLE_LENGTHS
    spans = shortest < lengths.min() and lengths.max() < longest  # also false for NaN
    if not (spans and np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-4 * lengths.prod()):
        got = np.round(affine, 4).tolist()
        raise DataError(path, name, got=got, want="three independent axes, all finite")
    return lengths


def display_axes(
    affine: np.ndarray, shape: Sequence[int], orientation: np.ndarray
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Choose the native axes of slices, rows and columns, and which of them to flip.

    The slice axis has one voxel, or the coarsest spacing, or is the most axial.

    Args:
        affine: native voxel index to world, (4, 4).
        shape: native shape.
        orientation: per native axis, the world axis that it follows most (0 R, 1 A, 2 S) and its sign, (3, 2).
    """
    world, sign = orientation[:, 0].astype(int), orientation[:, 1]
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    single = [axis for axis in range(3) if shape[axis] == 1]
    coarsest = [axis for axis in range(3) if lengths[axis] >= 0.99 * lengths.max()]
    slice_axis = single[0] if len(single) == 1 else max(coarsest, key=lambda axis: world[axis])
    wanted = _DISPLAY[int(world[slice_axis])]
    axes = [int(np.flatnonzero(world == axis)[0]) for axis, _ in wanted]
    flips = [bool(sign[axis] != way) for axis, (_, way) in zip(axes, wanted, strict=True)]
    return (axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2])
