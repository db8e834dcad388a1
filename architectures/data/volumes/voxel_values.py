"""From the numbers that a file holds to values that can be trusted: one frame, finite numbers, whole labels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from trifuse.kernels.choices import check_choice
from trifuse.kernels.errors import DataError

from .files import NonFinite
from .volume import Note

ROUNDING_TOLERANCE = 1e-3
"""Labels stored as floats or with a slope are rounded to integers if they are this close to them."""

_LABEL_TYPES = tuple(np.dtype(name) for name in ["u1", "i2", "u2", "i4"])


def three_dimensional(path: Path, data: np.ndarray, frame: int | None) -> tuple[np.ndarray, tuple[Note, ...]]:
    """Choose a frame, or drop axes of length 1 behind the third.

    Raises:
        DataError: there is no such frame, or there are several and none is chosen.
    """
    frames = math.prod(data.shape[3:])
    if frame is not None:
        if data.ndim < 4 or max(data.shape[3:]) != frames or not 0 <= frame < frames:
            want = f"0 to {frames - 1}" if data.ndim == 4 else "none"
            raise DataError(path, "frame", got=frame, want=f"{want} for a file of shape {data.shape}")
        return data.reshape(*data.shape[:3], frames, order="F")[..., frame], ()
    if frames > 1:
        raise DataError(
            path,
            "dim",
            got=f"shape {data.shape}",
            want="a 3-D volume",
            hint=f"choose one of its {frames} frames, frame=0 to frame={frames - 1}, or write it to a file of its own",
        )
    if data.ndim == 3:
        return data, ()
    return data.reshape(data.shape[:3], order="F"), (Note("dim", f"shape {data.shape}: axes of length 1 dropped"),)


def without_nonfinite(path: Path, native: np.ndarray, policy: NonFinite) -> tuple[np.ndarray, tuple[Note, ...]]:
    """Refuse NaN and infinite voxels, or replace them by zero or by the median of the finite ones, with a note.

    Raises:
        DataError: there are some and the policy is "error", or no voxel is finite.
        ValueError: there is no such policy.
    """
    check_choice("nonfinite", policy, NonFinite)
    finite = np.isfinite(native)
    if finite.all():
        return native, ()
    first = tuple(int(index) for index in np.unravel_index(int(np.argmin(finite)), finite.shape))
    count = finite.size - int(finite.sum())
    found = f"{count} NaN or infinite voxels ({count / native.size:.3%}), the first at voxel {first}"
    if policy == "error" or not finite.any():
        hint = 'images with few of them can be read with nonfinite="zero" or nonfinite="median"'
        raise DataError(path, "voxels", got=found, want="finite numbers", hint=hint)
    fill = 0.0 if policy == "zero" else float(np.median(native[finite]))
    return np.where(finite, native, native.dtype.type(fill)), (Note("voxels", f"{found}, replaced by {fill:g}"),)


def rounded_labels(path: Path, native: np.ndarray) -> np.ndarray:
    """Round labels stored as floats to integers, still in the type of ``native``.

    Raises:
        DataError: one is not finite, or further than ``ROUNDING_TOLERANCE`` from an integer.
    """
    native, _ = without_nonfinite(path, native, "error")
    rounded = np.rint(native)
    worst = np.unravel_index(int(np.argmax(np.abs(native - rounded))), native.shape)
    if abs(native[worst] - rounded[worst]) > ROUNDING_TOLERANCE:
        raise DataError(
            path,
            "labels",
            got=f"{native[worst]:g} at voxel {tuple(int(i) for i in worst)}",
            want=f"integers (within {ROUNDING_TOLERANCE:g})",
            hint="is this the image, or a probability map?",
        )
    return rounded


def smallest_label_type(path: Path, low: int, high: int) -> np.dtype:
    """Return the smallest integer type in wide use that holds labels from ``low`` to ``high``.

    Raises:
        DataError: 32 bits do not.
    """
    for dtype in _LABEL_TYPES:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise DataError(path, "labels", got=f"values from {low} to {high}", want="values that 32 bits hold")
