"""A heart whose segments are known from the world alone: rings that taper from the base to a solid tip.

The wall's angles are taken from vectors in the world, not from the axes of the array, so that nothing of the way in
which the library finds them is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

SEPTUM_OF_THE_CHEST = np.array([1.0, 1.0, 0.0]) / np.sqrt(2)
FIRST_SEGMENT = {"basal": 1, "mid": 7, "apical": 13}


@dataclass(frozen=True, eq=False)
class Heart:
    """Labels (D, H, W) with 1 cavity, 2 wall; the truth about them; and what a user would mark in every slice.

    ``clear`` is the wall further than 2.5 degrees from every edge of a sector. ``rv`` is a crescent along the septum.
    """

    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]
    truth: NDArray[np.uint8]
    clear: NDArray[np.bool_]
    rv: NDArray[np.bool_]
    anterior: tuple[float, float]
    inferior: tuple[float, float]

    @property
    def wall(self) -> NDArray[np.bool_]:
        return self.labels == 2

    def landmarks(self) -> dict:
        return {"reference": "landmarks", "rv_anterior": self.anterior, "rv_inferior": self.inferior}


def axes_of(seed: int, *, mirrored: bool = False) -> NDArray[np.float64]:
    """Directions of slices, rows and columns in the world, as columns: at random, left-handed if mirrored."""
    axes = Rotation.random(random_state=seed).as_matrix()
    return axes * ((1, 1, -1) if mirrored else (1, 1, 1))


def ring_heart(
    axes: NDArray[np.float64],
    *,
    levels: tuple[str, ...] = (*["basal"] * 3, *["mid"] * 2, *["apical"] * 3, "apex"),
    base_first: bool = True,
    screen_deg: float | None = None,
    spacing: tuple[float, float, float] = (8.0, 1.5, 1.2),
    size: tuple[int, int] = (48, 60),
) -> Heart:
    """Make one with a slice for each level, base to apex.

    Args:
        axes: directions of slices, rows and columns, from `axes_of`.
        levels: of the slices.
        base_first: whether the first slice of the array is at the base.
        screen_deg: direction of the anterior insertion, from that of columns anticlockwise on the screen; None puts it
            where it is in a chest.
        spacing: of slices, rows and columns, mm.
        size: rows and columns.
    """
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = 5.0, -3.0, 11.0
    to_apex = axes[:, 0] * (1 if base_first else -1)
    if screen_deg is None:
        septum = SEPTUM_OF_THE_CHEST - (SEPTUM_OF_THE_CHEST @ to_apex) * to_apex
        septum /= np.linalg.norm(septum)
        anterior = np.cos(np.pi / 3) * septum - np.sin(np.pi / 3) * np.cross(to_apex, septum)
    else:
        angle = np.deg2rad(screen_deg)
        anterior = np.cos(angle) * axes[:, 2] - np.sin(angle) * axes[:, 1]
    onwards = np.cross(to_apex, anterior)  # anterior, septum, inferior: anticlockwise, seen from the apex

    middle = (np.array(size) - 1) / 2
    offsets = np.argwhere(np.ones(size)) - middle
    place = offsets @ affine[:3, 1:3].T
    radius = np.linalg.norm(place, axis=1).reshape(size)
    phi = np.rad2deg(np.arctan2(place @ onwards, place @ anterior)).reshape(size) % 360
    slices = [_ring_slice(level, number / len(levels), radius, phi) for number, level in enumerate(levels)]
    labels, truth, clear, rv = (np.stack(part)[:: 1 if base_first else -1] for part in zip(*slices, strict=True))
    inferior = np.cos(np.deg2rad(120)) * anterior + np.sin(np.deg2rad(120)) * onwards
    marks = [tuple(middle + 20 * np.linalg.lstsq(affine[:3, 1:3], way, rcond=None)[0]) for way in (anterior, inferior)]
    return Heart(labels, affine, truth, clear, rv, *marks)


def _ring_slice(level: str, down: float, radius: NDArray, phi: NDArray) -> tuple[NDArray, ...]:
    """Return labels, truth, what is clear and the right ventricle of a slice that lies this far down the heart."""
    outer = 22.0 - 8.0 * down
    inner = -1.0 if level == "apex" else outer - 7.0
    wall = (radius > inner) & (radius <= outer)
    labels = np.where(wall, 2, np.where(radius <= inner, 1, 0)).astype(np.uint8)
    rv = (radius > outer) & (radius < outer + 9) & (phi < 120) & (level != "apex")
    if level == "apex":
        return labels, np.where(wall, 17, 0).astype(np.uint8), wall, rv
    width, shift, number = (90, 75, 4) if level == "apical" else (60, 60, 6)
    turned = (phi + shift) % 360  # the first segment, anterior, ends where the septum begins
    segment = FIRST_SEGMENT[level] + (turned // width).astype(int) % number
    edge = np.abs((turned + width / 2) % width - width / 2)
    return labels, np.where(wall, segment, 0).astype(np.uint8), wall & (edge > 2.5), rv
