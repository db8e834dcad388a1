"""The wall of the left ventricle in the 17 segments of the American Heart Association's model.

Basal (1-6), mid (7-12) and apical (13-16) thirds of a short-axis stack are cut into sectors, the tip is 17. Angles are
measured in millimetres about the ventricle's long axis, from the anterior insertion of the right ventricle through the
septum to the inferior insertion and round.

Source: Cerqueira et al. (2002), "Standardized myocardial segmentation and nomenclature for tomographic imaging of the
heart", Circulation 105.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trifuse.architectures.storage.segment_maps import AHA_SEGMENTS
from trifuse.kernels import DataError, ShapeError
from trifuse.kernels.choices import check_choice

from .aha17_angles import WHAT, Insertions, Plane, Reference, zero_angles
from .aha17_slices import Slices, common_centre, find_levels, measure_slices, order_slices

# First edge of the sectors in degrees, their width, and the segments from there on; half-open.
SECTORS = {
    "basal": (0, 60, (2, 3, 4, 5, 6, 1)),
    "mid": (0, 60, (8, 9, 10, 11, 12, 7)),
    "apical": (15, 90, (14, 15, 16, 13)),
    "apex": (0, 360, (17,)),
}
Centre = Literal["slice", "global"]


def aha17_labels(
    labels: NDArray[Any],
    affine: ArrayLike,
    *,
    reference: Reference,
    rv_anterior: ArrayLike | None = None,
    rv_inferior: ArrayLike | None = None,
    rv_mask: NDArray[Any] | None = None,
    angle_deg: float | None = None,
    base_first: bool | None = None,
    cavity: Sequence[int] = (1,),
    wall: Sequence[int] = (2, 3),
    centre: Centre = "slice",
    force_last: bool = False,
    slice_axis: int = 0,
    note: Callable[[str], object] = lambda text: None,
) -> NDArray[np.uint8]:
    """Give every voxel of the wall its segment.

    Slices are put in order from base to apex. Those of the apical end whose cavity has fewer than 10 pixels are the
    apex, 17. The first slice from the base that the wall goes all around (in 90 % of 10-degree steps) begins the ring;
    wall above it is basal. From there to the apex the ring is cut in thirds by position, so that a slice that is empty
    or open further down changes nothing for the others. Islands of wall are numbered like the rest of their slice.

    Args:
        labels: integer classes, three axes, usually (D, H, W).
        affine: index to right-anterior-superior world in mm, (4, 4), for the axes of ``labels``.
        reference: where angles start; there is no default, and one choice should serve a whole cohort. The options that
            another one needs are not looked at.

            * ``"landmarks"``: at the anterior insertion of the right ventricle, ``rv_anterior``; they run towards
              ``rv_inferior``, by the shorter way.
            * ``"rv_mask"``: at the anterior end of the contact between the ventricles.
            * ``"orientation"``: 60 degrees before the middle of the septum, which faces the patient's right and front.
            * ``"fixed_angle"``: at ``angle_deg``.

            Without an inferior insertion the affine tells which way angles run.
        rv_anterior: insertion as (row, column), indices on the two axes of ``labels`` that are no slices; one point
            for all slices, or one for each, (D, 2).
        rv_inferior: the inferior insertion, likewise; optional.
        rv_mask: cavity of the right ventricle, not zero where it is, on the grid of ``labels``.
        angle_deg: direction of the anterior insertion, from that of growing columns towards shrinking rows.
        base_first: whether the first slice is at the base; None takes the end with the larger cavity.
        cavity: classes of the blood pool.
        wall: classes of the wall.
        centre: of the angles: the centroid of each slice's filled ``"slice"``, or ``"global"``, one for all slices,
            over those of the basal and mid thirds.
        force_last: whether the most apical slice becomes the apex where no other is, if the wall closes in two slices.
        slice_axis: the axis of ``labels`` that counts slices.
        note: is called with a sentence for every decision that may be wrong.

    Returns:
        0 (no wall) to 17, uint8, in the shape of ``labels``.

    Raises:
        ShapeError: ``labels``, ``rv_mask``, the affine or the landmarks have another shape.
        TypeError: ``labels`` are no integers.
        ValueError: an unknown word for ``reference`` or ``centre``.
        DataError: there is no wall, it closes in no slice, ``base_first`` contradicts the cavity, or an insertion is
            missing.
        MissingExtra: scipy is not installed.
    """
    check_choice("reference", reference, Reference)
    check_choice("centre", centre, Centre)
    known = Insertions(reference, rv_anterior, rv_inferior, _shown(rv_mask, slice_axis, labels), angle_deg)
    shown = np.moveaxis(_checked_labels(labels), slice_axis, 0)
    others = [axis for axis in range(3) if axis != slice_axis % 3]
    plane = Plane.of(_checked_axes(affine)[:, [slice_axis, *others]])
    slices = measure_slices(np.isin(shown, wall), np.isin(shown, cavity), plane)
    if not slices.walled:
        raise _no_wall(shown, wall)

    base_first = order_slices(slices, plane.step, base_first, note)
    levels = find_levels(slices, base_first, force_last, note)
    centres = slices.centres if centre == "slice" else _common_centres(slices, levels)
    ring = [index for index, level in levels.items() if level != "apex"]
    zero, turn = zero_angles(known, plane, centres, slices.filled, ring, plane.turn(base_first), note)
    segments = _numbered_wall(slices.wall, levels, plane, centres, zero, turn)
    return np.ascontiguousarray(np.moveaxis(segments, 0, slice_axis))


def _numbered_wall(
    wall: NDArray[np.bool_],
    levels: Mapping[int, str],
    plane: Plane,
    centres: NDArray[np.float64],
    zero: NDArray[np.float64],
    turn: int,
) -> NDArray[np.uint8]:
    """Return the segment of every pixel of the wall, 0 elsewhere: uint8 (D, H, W), slices first.

    Args:
        wall: where the wall is, (D, H, W).
        levels: the level of each slice that has one, by its index.
        plane: the plane of the slices.
        centres: of the angles, (D, 2), as (row, column).
        zero: the angle of the anterior insertion in each slice, in degrees.
        turn: 1 or -1, the direction in which angles run through the septum.
    """
    segments = np.zeros(wall.shape, np.uint8)
    for index, level in levels.items():
        places = np.nonzero(wall[index])
        angles = plane.degrees(np.stack(places, -1) - centres[index])
        segments[index][places] = sector(level, turn * (angles - zero[index]))
    return segments


def aha17_map(labels: NDArray[Any], affine: ArrayLike, *, reference: Reference, **options: Any) -> NDArray[np.uint8]:
    """Return the segments of the wall as 17 masks, 1 inside: uint8 (17, D, H, W).

    Each voxel is in at most one of them, and together they are the wall. Arguments are those of ``aha17_labels``.
    """
    segments = aha17_labels(labels, affine, reference=reference, **options)
    return (segments == np.arange(1, AHA_SEGMENTS + 1, dtype=np.uint8)[:, None, None, None]).astype(np.uint8)


def sector(level: str, angles_deg: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the segment that each angle from the anterior insertion, through the septum, has at a level."""
    begin, width, segments = SECTORS[level]
    turned = np.round(angles_deg - begin, 9) % 360  # rounded, so that an edge belongs to the sector that it begins
    return np.array(segments, np.uint8)[np.nan_to_num(turned // width).astype(int)]


def scar_burden_ml(
    labels: NDArray[Any], segments: NDArray[Any], affine: ArrayLike, *, scar: int = 3
) -> tuple[NDArray[np.float64], float]:
    """Return the volume of scar in each of the 17 segments, and that of scar outside all of them, in mL.

    Args:
        labels: classes, of the truth or of a prediction, (D, H, W).
        segments: 0 to 17 on the same grid, of the reference, from ``aha17_labels``.
        affine: index to world in mm, (4, 4).
        scar: its class.

    Raises:
        ShapeError: the two have different shapes.
    """
    if labels.shape != segments.shape:
        raise ShapeError(f"labels and segments must have one shape, got {labels.shape} and {segments.shape}")
    counts = np.bincount(segments[labels == scar], minlength=AHA_SEGMENTS + 1)
    volumes = counts * (abs(np.linalg.det(_checked_axes(affine))) / 1000)
    return volumes[1:], float(volumes[0])


def wall_volume_ml(segments: NDArray[Any], affine: ArrayLike) -> NDArray[np.float64]:
    """Return the volume of each of the 17 segments in mL; arguments as for ``scar_burden_ml``."""
    return scar_burden_ml(segments > 0, segments, affine, scar=1)[0]


def _common_centres(slices: Slices, levels: dict[int, str]) -> NDArray[np.float64]:
    centres = slices.centres
    return np.broadcast_to(common_centre(slices, levels), centres.shape)


def _no_wall(shown: NDArray[Any], wall: Sequence[int]) -> DataError:
    got = f"classes {np.unique(shown).tolist()} in {len(shown)} slices, 0 to {len(shown) - 1}"
    return DataError(WHAT, "myocardium", got=got, want=f"wall, class {' or '.join(map(str, wall))}")


def _checked_labels(labels: NDArray[Any]) -> NDArray[Any]:
    if labels.ndim != 3:
        raise ShapeError(f"labels must have three axes, (D, H, W), got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    return labels


def _shown(rv_mask: NDArray[Any] | None, slice_axis: int, labels: NDArray[Any]) -> NDArray[np.bool_] | None:
    if rv_mask is None:
        return None
    if rv_mask.shape != labels.shape:
        raise ShapeError(f"rv_mask must have the shape of the labels, {labels.shape}, got {rv_mask.shape}")
    return np.moveaxis(rv_mask != 0, slice_axis, 0)


def _checked_axes(affine: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(affine, float)
    if matrix.shape != (4, 4):
        raise ShapeError(f"affine must be (4, 4), got {matrix.shape}")
    axes = matrix[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not (np.isfinite(matrix).all() and abs(np.linalg.det(axes)) > 1e-4 * lengths.prod()):
        raise DataError(WHAT, "affine", got=np.round(matrix, 4).tolist(), want="three independent axes, all finite")
    return axes
