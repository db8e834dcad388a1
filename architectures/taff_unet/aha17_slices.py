"""The slices of a short-axis stack: the middle of each, whether its wall closes, and its level from base to apex."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trifuse.kernels import DataError

from .aha17_angles import WHAT, Plane, scipy_ndimage

LEVELS = ("basal", "mid", "apical", "apex")
APEX_PIXELS = 10  # a cavity of fewer is none
RAYS = 36
CLOSED = 0.9  # of the rays meet the wall
REVERSED = 1.5  # so many times the cavity at the apical end is no noise
APEX_DIRECTION = (-1.0, 1.0, -1.0)  # where the apex points in a chest: left, front, feet


@dataclass(frozen=True, eq=False)
class Slices:
    """Measurements of the D slices of a stack.

    Attributes:
        wall: (D, H, W), bool.
        filled: wall, cavity and what they enclose, (D, H, W), bool.
        cavity_pixels: what of that is no wall, (D,).
        centres: centroids of ``filled`` as (row, column), (D, 2); NaN in a slice without wall.
        coverage: share of the directions from there that meet the wall, (D,).
    """

    wall: NDArray[np.bool_]
    filled: NDArray[np.bool_]
    cavity_pixels: NDArray[np.int64]
    centres: NDArray[np.float64]
    coverage: NDArray[np.float64]

    @property
    def walled(self) -> list[int]:
        """The slices with wall, in the order of the array."""
        return np.flatnonzero(self.wall.any((1, 2))).tolist()

    @property
    def closed(self) -> list[int]:
        """Those of them that the wall goes all around."""
        return [index for index in self.walled if self.coverage[index] >= CLOSED]


def measure_slices(wall: NDArray[np.bool_], cavity: NDArray[np.bool_], plane: Plane) -> Slices:
    """Measure every slice of a stack, (D, H, W).

    A slice's body is the part of it that holds most of its cavity, so that an island moves no centre; without a cavity
    it is all the wall.
    """
    ndimage, depth = scipy_ndimage(), len(wall)
    filled = np.zeros_like(wall)
    centres, coverage = np.full((depth, 2), np.nan), np.zeros(depth)
    for index in np.flatnonzero(wall.any((1, 2))):
        body = ndimage.binary_fill_holes(wall[index] | cavity[index])
        parts, number = ndimage.label(body)
        inside = np.bincount(parts[body & ~wall[index]], minlength=number + 1)
        if inside.any():
            body = parts == inside.argmax()
        filled[index] = body
        centres[index] = np.argwhere(body).mean(0)
        coverage[index] = _coverage(wall[index], centres[index], plane)
    return Slices(wall, filled, (filled & ~wall).sum((1, 2)), centres, coverage)


def _coverage(wall: NDArray[np.bool_], centre: NDArray[np.float64], plane: Plane) -> float:
    """Return the share of the directions whose ray meets the wall; rays find thin walls of few pixels, too."""
    directions = np.deg2rad((np.arange(RAYS) + 0.5) * 360 / RAYS)
    reach_mm = np.linalg.norm(plane.to_mm(np.argwhere(wall) - centre), axis=1).max()
    radii = np.arange(0, reach_mm + plane.pixel_mm, plane.pixel_mm / 2)
    rays = radii[:, None, None] * np.stack([np.cos(directions), np.sin(directions)], -1)  # (radii, RAYS, 2)
    places = np.moveaxis(plane.to_index(rays) + centre, -1, 0)
    met = scipy_ndimage().map_coordinates(wall.astype(np.uint8), places, order=0, mode="constant").any(0)
    return float(met.mean())


def order_slices(
    slices: Slices, step: NDArray[np.float64], base_first: bool | None, note: Callable[[str], object]
) -> bool:
    """Return whether the first slice is at the base.

    Compared are the cavities of either half of the closed slices. Where they do not differ, a stack runs from the base
    to where the apex points in a chest.

    Args:
        slices: what is seen.
        step: from one slice to the next in the world.
        base_first: what is known.
        note: is called with a guess.

    Raises:
        DataError: what is known contradicts the cavity.
    """
    pixels = slices.cavity_pixels[slices.closed]
    half = len(pixels) // 2
    first, last = (int(pixels[:half].sum()), int(pixels[-half:].sum())) if half else (0, 0)
    if base_first is not None:
        near, far = (first, last) if base_first else (last, first)
        if far > REVERSED * near:
            apical = slices.closed[-1 if base_first else 0]
            raise DataError(
                WHAT,
                f"order of the slices, base_first={base_first}",
                got=f"a cavity of {far} pixels in the half of slice {apical}, said to be apical, {near} in the other",
                want="the larger cavity at the base",
                hint=f"pass base_first={not base_first}, or None to have it decided by the cavity",
            )
        return base_first
    if first == last:
        found = bool(np.dot(step, APEX_DIRECTION) >= 0)
        note(f"base taken at the {'first' if found else 'last'} slice: the cavity does not tell, the affine does")
        return found
    note(f"base taken at the {'first' if first > last else 'last'} slice, where the cavity is larger")
    return first > last


def find_levels(slices: Slices, base_first: bool, force_last: bool, note: Callable[[str], object]) -> dict[int, str]:
    """Return the level of every slice with wall.

    Raises:
        DataError: the wall closes in no slice that has a cavity.
    """
    order = slices.walled if base_first else slices.walled[::-1]
    ring = list(order)
    while ring and slices.cavity_pixels[ring[-1]] < APEX_PIXELS:
        ring.pop()
    closed = [index for index in ring if index in slices.closed]
    if not closed:
        best = max(order, key=lambda index: (slices.cavity_pixels[index] >= APEX_PIXELS, slices.coverage[index]))
        raise DataError(
            WHAT,
            "ring of the wall, closed in no slice",
            got=f"{slices.coverage[best]:.0%} of the circle and a cavity of {slices.cavity_pixels[best]} pixels in the "
            f"best slice, {best}",
            want=f"{CLOSED:.0%} of it round a cavity of {APEX_PIXELS} pixels",
            hint="check which classes are wall and cavity, and which axis counts the slices",
        )
    if force_last and len(ring) == len(order) and len(closed) > 1:
        ring.pop()
    begin, end = closed[0], ring[-1]
    levels = {index: _third(abs(index - begin), abs(end - begin) + 1) for index in ring}
    levels |= dict.fromkeys(ring[: ring.index(begin)], "basal")
    levels |= dict.fromkeys(order[len(ring) :], "apex")
    if ring[0] != begin:
        note(f"the wall closes from slice {begin} on; what comes before, at the base, is basal")
    for index in ring[ring.index(begin) :]:
        if index not in closed:
            note(f"the wall of slice {index} covers {slices.coverage[index]:.0%} of the circle only")
    return levels


def _third(place: int, length: int) -> str:
    """Return the third that the middle of a slice lies in, by whole numbers."""
    middle = 3 * (2 * place + 1)
    return "basal" if middle < 2 * length else "mid" if middle < 4 * length else "apical"


def common_centre(slices: Slices, levels: dict[int, str]) -> NDArray[Any]:
    """Return the centroid (row, column) of all that is filled in the basal and mid thirds."""
    chosen = [index for index, level in levels.items() if level in ("basal", "mid")]
    return np.argwhere(slices.filled[chosen])[:, 1:].mean(0)
