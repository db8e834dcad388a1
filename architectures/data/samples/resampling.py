"""Volumes resampled in plane to one spacing, and back: what networks on patches see, in training and use.

Slices are left where they are: the networks are two-dimensional. A pixel is an area, so that the outer edges of a
slice stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trifuse.architectures.data.volumes.volume import Volume
from trifuse.kernels.errors import DataError, MissingExtra

from .preprocessing import Preprocessing
from .volume_to_slices import resized_labels, scaled_voxels

MOST_PIXELS_OF_ONE = 16  # along rows and along columns: beyond, nothing is seen, and slices take hours and gigabytes


@dataclass(frozen=True)
class PlaneGrid:
    """Where the resampled slices of a volume lie.

    Attributes:
        box: slices, rows and columns that hold all non-zero voxels, of the native array (D, H, W).
        size: rows and columns (h, w) of the resampled slices.
    """

    box: tuple[slice, slice, slice]
    size: tuple[int, int]

    @classmethod
    def of(cls, volume: Volume, spacing_mm: tuple[float, float]) -> PlaneGrid:
        """Crop a volume to its non-zero voxels, and divide that box into pixels of ``spacing_mm`` (rows, columns).

        Raises:
            DataError: the volume's own pixels are more than `MOST_PIXELS_OF_ONE` times as long.
        """
        if any(own > MOST_PIXELS_OF_ONE * new for own, new in zip(volume.spacing_mm[1:], spacing_mm, strict=True)):
            own, new = (f"{rows:g} x {columns:g} mm" for rows, columns in (volume.spacing_mm[1:], spacing_mm))
            raise DataError(
                volume.path or "image",
                "spacing",
                got=f"pixels of {own}, which would be resampled to {new}",
                want=f"at most {MOST_PIXELS_OF_ONE} times that of the resampled slices",
                hint="is the header's spacing in mm?",
            )
        box = nonzero_box(volume.voxels)
        return cls(box, plane_size([of.stop - of.start for of in box[1:]], volume.spacing_mm[1:], spacing_mm))

    def image(self, voxels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
        """Scale the values of the box, then resample by cubic splines: float32 of shape (d, h, w).

        Raises:
            MissingExtra: scipy is not installed, and there is something to resample.
        """
        return _planes(scaled_voxels(voxels[self.box], preprocessing), self.size, _cubic)

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """Resample every class bilinearly, and take the largest: uint8 of shape (d, h, w).

        Raises:
            MissingExtra: scipy is not installed, and there is something to resample.
        """
        return _planes(labels[self.box].astype(np.uint8), self.size, _largest_class)

    def nearest(self, labels: np.ndarray) -> np.ndarray:
        """Take the nearest pixel's label, (d, h, w)."""
        return resized_labels(labels[self.box], self.size)


def plane_size(pixels: Sequence[int], spacing_mm: Sequence[float], wanted_mm: Sequence[float]) -> tuple[int, int]:
    """Return rows and columns of a plane of so many pixels, once it is resampled from one spacing to another."""
    rows, columns = (
        max(round(count * old / new), 1) for count, old, new in zip(pixels, spacing_mm, wanted_mm, strict=True)
    )
    return rows, columns


def nonzero_box(voxels: np.ndarray) -> tuple[slice, slice, slice]:
    """Return the smallest box that holds all non-zero voxels; all of it where there are none."""
    filled = voxels != 0
    if not filled.any():
        filled = np.ones_like(filled)
    first, second, third = (
        np.flatnonzero(filled.any(axis=axes))[[0, -1]].tolist() for axes in ((1, 2), (0, 2), (0, 1))
    )
    return slice(first[0], first[1] + 1), slice(second[0], second[1] + 1), slice(third[0], third[1] + 1)


def _planes(planes: np.ndarray, size: tuple[int, int], resample: Callable[..., np.ndarray]) -> np.ndarray:
    if planes.shape[1:] == size:
        return planes
    factors = [new / old for new, old in zip(size, planes.shape[1:], strict=True)]
    return np.stack([resample(plane, factors) for plane in planes])


def _cubic(plane: np.ndarray, factors: list[float]) -> np.ndarray:
    return _zoom(plane, factors, order=3)


def _largest_class(plane: np.ndarray, factors: list[float]) -> np.ndarray:
    values = np.unique(plane)
    shares = [_zoom((plane == value).astype(np.float32), factors, order=1) for value in values]
    return values[np.argmax(shares, axis=0)]


def _zoom(plane: np.ndarray, factors: list[float], order: int) -> Any:
    try:
        from scipy.ndimage import zoom
    except ImportError:
        raise MissingExtra("scipy", "med", "resampling slices") from None
    return zoom(plane, factors, order=order, mode="nearest", grid_mode=True)
