"""Directions in a short-axis slice, in millimetres, and where the right ventricle inserts into the left one's wall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trifuse.kernels import DataError, MissingExtra, ShapeError

WHAT = "AHA-17 segments"
Reference = Literal["landmarks", "rv_mask", "orientation", "fixed_angle"]
SEPTUM_DIRECTION = (1.0, 1.0, 0.0)  # right and front of the patient
SEPTUM_DEG = 60.0  # from the anterior insertion to the middle of the septum
CONTACT_PIXELS = 2.0  # between the ventricles, at most
NEEDS = {"landmarks": "rv_anterior", "rv_mask": "rv_mask", "fixed_angle": "angle_deg"}


@dataclass(frozen=True, eq=False)
class Plane:
    """The plane of the slices: x along growing columns, y across it towards shrinking rows, in mm.

    Attributes:
        matrix: from (row, column) to (x, y), (2, 2).
        axes: x and y in the world, (2, 3), of length 1.
        step: from one slice to the next in the world, (3,), in mm.
    """

    matrix: NDArray[np.float64]
    axes: NDArray[np.float64]
    step: NDArray[np.float64]

    @classmethod
    def of(cls, columns: NDArray[np.float64]) -> Plane:
        """Make it of the affine's columns for slices, rows and columns, (3, 3)."""
        step, row, column = columns.T
        x = column / np.linalg.norm(column)
        y = (row @ x) * x - row
        y /= np.linalg.norm(y)
        axes = np.stack([x, y])
        return cls(axes @ columns[:, 1:], axes, step)

    @property
    def pixel_mm(self) -> float:
        """The shorter side of a pixel."""
        return float(np.linalg.norm(self.matrix, axis=0).min())

    def to_mm(self, offsets: NDArray[Any]) -> NDArray[np.float64]:
        """Turn differences of (row, column) into (x, y)."""
        return offsets @ self.matrix.T

    def to_index(self, offsets_mm: NDArray[Any]) -> NDArray[np.float64]:
        """Turn (x, y) into differences of (row, column)."""
        return offsets_mm @ np.linalg.inv(self.matrix).T

    def degrees(self, offsets: NDArray[Any]) -> NDArray[np.float64]:
        """Return the directions of differences of (row, column), from x towards y."""
        x, y = np.moveaxis(self.to_mm(offsets), -1, 0)
        return np.rad2deg(np.arctan2(y, x))

    def turn(self, base_first: bool) -> int:
        """Return the sign of the way from the anterior wall through the septum: seen from the apex, anticlockwise."""
        to_apex = self.step if base_first else -self.step
        return 1 if np.cross(*self.axes) @ to_apex > 0 else -1


@dataclass(frozen=True, eq=False)
class Insertions:
    """What is known of the insertions; see ``aha17_labels``."""

    reference: Reference
    rv_anterior: ArrayLike | None
    rv_inferior: ArrayLike | None
    rv_mask: NDArray[np.bool_] | None
    angle_deg: float | None


def zero_angles(
    known: Insertions,
    plane: Plane,
    centres: NDArray[np.float64],
    filled: NDArray[np.bool_],
    ring: list[int],
    turn: int,
    note: Callable[[str], object],
) -> tuple[NDArray[np.float64], int]:
    """Return the direction of the anterior insertion in every slice, (D,) degrees, and which way angles run from it.

    Args:
        known: what is known of the insertions.
        plane: of the slices.
        centres: (row, column) that angles are measured about, (D, 2).
        filled: the left ventricle, (D, H, W).
        ring: the slices whose angles matter.
        turn: which way angles run by the affine.
        note: is called with what may be wrong.

    Raises:
        DataError: an insertion is missing in a slice, or cannot be told.
        ShapeError: there are not as many landmarks as slices.
    """
    depth = len(centres)
    need = NEEDS.get(known.reference)
    if need and getattr(known, need) is None:
        hint = "mark the insertion, or take reference='orientation', which reads it from the affine"
        where = f"insertion of the right ventricle in slices {min(ring)} to {max(ring)}"
        raise DataError(WHAT, where, got="none", want=f"{need}, for reference={known.reference!r}", hint=hint)
    if known.reference == "landmarks":
        return _landmark_angles(known, plane, centres, filled.shape, ring, turn, note)
    if known.rv_mask is not None and known.reference == "rv_mask":
        return _contact_angles(known.rv_mask, plane, centres, filled, ring, turn), turn
    if known.reference == "fixed_angle":
        if not abs(float(known.angle_deg)) <= 360:  # type: ignore[arg-type]  # that it is there was checked above
            raise DataError(WHAT, "angle_deg", got=f"{known.angle_deg:g}", want="degrees, from -360 to 360")
        return np.full(depth, known.angle_deg, float), turn
    return np.full(depth, _septum_angle(plane) - turn * SEPTUM_DEG), turn


def _landmark_angles(
    known: Insertions,
    plane: Plane,
    centres: NDArray[np.float64],
    shape: tuple[int, ...],
    ring: list[int],
    turn: int,
    note: Callable[[str], object],
) -> tuple[NDArray[np.float64], int]:
    anterior = plane.degrees(_points("rv_anterior", known.rv_anterior, shape, centres, ring))
    if known.rv_inferior is None:
        note("no inferior insertion is known: the affine tells which way angles run")
        return anterior, turn
    inferior = plane.degrees(_points("rv_inferior", known.rv_inferior, shape, centres, ring))
    between = np.deg2rad(turn * (inferior - anterior)[ring])
    if np.hypot(np.sin(between).mean(), 1 - np.cos(between).mean()) < 0.01:
        got = f"both in one direction, {anterior[ring[0]]:.0f} degrees in slice {ring[0]}"
        raise DataError(
            WHAT, "insertions of the right ventricle", got=got, want="two points on either side of the septum"
        )
    if np.sin(between).mean() < -1e-9:
        note("the insertions run the other way round than the affine says: one of the two is mirrored; they decide")
        turn = -turn
    return anterior, turn


def _points(
    name: str, points: ArrayLike | None, shape: tuple[int, ...], centres: NDArray[np.float64], ring: list[int]
) -> NDArray[np.float64]:
    """Return where a landmark lies from the centre of every slice, (D, 2), in pixels."""
    depth, height, width = shape
    given = np.asarray(points, float)
    if given.shape not in ((2,), (depth, 2)):
        raise ShapeError(
            f"{name} must be (row, column) or one such point for each slice, ({depth}, 2), got {given.shape}"
        )
    given = np.broadcast_to(given, (depth, 2))
    for index in ring:
        inside = np.all((given[index] >= -0.5) & (given[index] <= (height - 0.5, width - 0.5)))
        if not inside or np.allclose(given[index], centres[index], atol=1e-6):
            raise DataError(
                WHAT,
                f"insertion of the right ventricle, {name} of slice {index}",
                got=tuple(given[index].tolist()),
                want=f"(row, column) within {height} x {width} pixels, not in the ventricle's middle",
                hint="give one point for each slice with wall, or one for all of them",
            )
    return given - centres


def _septum_angle(plane: Plane) -> float:
    """Return the direction of the middle of the septum by the axes of the world."""
    x, y = plane.axes @ np.array(SEPTUM_DIRECTION) / np.linalg.norm(SEPTUM_DIRECTION)
    if np.hypot(x, y) < 0.2:
        got = "slices that face the patient's right and front, where the septum should be"
        hint = "give the insertions of the right ventricle, or fixed_angle"
        raise DataError(WHAT, "orientation", got=got, want="slices across the left ventricle", hint=hint)
    return float(np.rad2deg(np.arctan2(y, x)))


def _contact_angles(
    rv_mask: NDArray[np.bool_],
    plane: Plane,
    centres: NDArray[np.float64],
    filled: NDArray[np.bool_],
    ring: list[int],
    turn: int,
) -> NDArray[np.float64]:
    """Return where the ventricles' contact begins; a slice without contact is given that of the nearest with one."""
    begins = {index: _contact_begin(rv_mask[index], plane, centres[index], filled[index], turn) for index in ring}
    known = [index for index in ring if begins[index] is not None]
    if not known:
        raise DataError(
            WHAT,
            "insertion of the right ventricle",
            got=f"an rv_mask that touches the left ventricle in none of slices {min(ring)} to {max(ring)}",
            want=f"one within {CONTACT_PIXELS:g} pixels of it",
            hint="check that the mask lies on the grid of the labels",
        )
    angles = np.full(len(centres), np.nan)
    for index in ring:
        angles[index] = begins[min(known, key=lambda other: abs(other - index))]
    return angles


def _contact_begin(
    rv_mask: NDArray[np.bool_], plane: Plane, centre: NDArray[np.float64], filled: NDArray[np.bool_], turn: int
) -> float | None:
    """Return the direction of the first pixel of the right ventricle's largest part that lies at the left one."""
    ndimage = scipy_ndimage()
    parts, number = ndimage.label(rv_mask)
    if not number:
        return None
    largest = parts == np.bincount(parts.flat)[1:].argmax() + 1
    sides_mm = np.linalg.norm(plane.matrix, axis=0)
    distance_mm = ndimage.distance_transform_edt(~filled, sampling=sides_mm)
    contact = np.argwhere(largest & (distance_mm <= CONTACT_PIXELS * sides_mm.max()))
    if not len(contact):
        return None
    along = np.sort(turn * plane.degrees(contact - centre))
    gaps = np.diff(along, append=along[0] + 360)
    return float(turn * along[(gaps.argmax() + 1) % len(along)])


def scipy_ndimage() -> ModuleType:
    """Return ``scipy.ndimage``.

    Raises:
        MissingExtra: scipy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError:
        raise MissingExtra("scipy", "med", "dividing a heart into segments") from None
    return ndimage
