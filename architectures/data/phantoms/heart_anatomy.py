"""The left ventricle that `scar_phantom` scans: a wall that tapers to an apex, a right ventricle, scar and artefacts.

Positions are those of the heart: shape (3, *grid), millimetres along the anterior direction, the septal direction and
the long axis from base (0) to apex. Segments are those of the American Heart Association's model, 1 to 17.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .solids import coverage, ellipsoid

LONG_AXIS = np.array([0.75, -0.5, -0.45]) / np.linalg.norm([0.75, -0.5, -0.45])
"""From base to apex, in the patient's left, back and head (L, P, S): to the left, the front and the feet."""
SEPTAL = np.cross(LONG_AXIS, [0.0, 0.0, 1.0]) / np.linalg.norm(np.cross(LONG_AXIS, [0.0, 0.0, 1.0]))
"""Across the long axis, to the right and the front, where the septum is."""
ANTERIOR = np.cross(SEPTAL, LONG_AXIS)
"""Across both, to the head mostly: to the anterior wall's middle."""

INSERTION_DEGREES = 30.0  # from the anterior wall's middle to the anterior insertion of the right ventricle
SEPTUM_DEGREES = 120.0  # from there to the inferior insertion
TERRITORY_DEGREES = (0.0, 120.0, 240.0)
"""Middles of what the left anterior descending, right and circumflex arteries supply, from the anterior insertion."""

BLOOD, MYOCARDIUM, SCAR = 1, 2, 3


def segment_directions() -> np.ndarray:
    """Return the direction that each of the 17 segments faces, in L, P and S, (17, 3)."""
    rows = []
    for towards_apex, segments in ((0.0, 6), (0.25, 6), (0.5, 4)):
        for segment in range(segments):
            psi = np.deg2rad(330 + 360 / segments * segment + INSERTION_DEGREES)
            across = np.cos(psi) * ANTERIOR + np.sin(psi) * SEPTAL
            rows.append(np.sqrt(1 - towards_apex**2) * across + towards_apex * LONG_AXIS)
    return np.array([*rows, LONG_AXIS])


def segment_of(degrees: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return the AHA segment, 1 to 17.

    Args:
        degrees: from the anterior insertion of the right ventricle through the septum.
        level: 0 at the base, 1 at the end of the cavity, more in the apex.
    """
    ring = (((degrees + 60) % 360) // 60).astype(int)
    apical = (((degrees + 75) % 360) // 90).astype(int)
    return np.select([level < 1 / 3, level < 2 / 3, level < 1], [ring + 1, ring + 7, apical + 13], 17)


@dataclass(frozen=True)
class Bright:
    """A bright part of the wall: scar, or an artefact that looks like one.

    Attributes:
        degrees, level: its middle, as in ``segment_of``.
        half_degrees, half_level: how far it reaches.
        transmurality: share of the wall that it takes in its middle, from inside.
        value: its brightness.
    """

    degrees: float
    level: float
    half_degrees: float
    half_level: float
    transmurality: float
    value: float


class Heart:
    """A left ventricle and what is around it on a grid of positions.

    Attributes:
        picture: brightness of every position.
        labels: 0 background, 1 blood pool, 2 myocardium, 3 scar.
        segments: AHA segment of every position, wall or not.
    """

    def __init__(self, rng: np.random.Generator, position: np.ndarray, softness_mm: float) -> None:
        """Draw a heart."""
        self.rng, self.position, self.softness_mm = rng, position, softness_mm
        self.picture = np.full(position.shape[1:], 0.03)
        self.size = rng.uniform(0.9, 1.1)
        self.radius_mm = 30.0 * self.size
        self.length_mm = rng.uniform(58, 64)
        self.wall_mm = rng.uniform(9.5, 11.5) * self.size
        along = np.degrees(np.arctan2(position[1], position[0])) - INSERTION_DEGREES
        self.degrees = along % 360
        outer, inner = self._ball(0.0), self._ball(self.wall_mm)
        self.level = position[2] / (self.length_mm - self.wall_mm)
        self.segments = segment_of(self.degrees, self.level)
        self.depth = outer / np.maximum(outer - inner, 1e-6)  # 0 outside the wall's outer face, 1 at its inner one
        self._paint_surroundings(outer)
        self.blood = rng.uniform(0.52, 0.66)
        self.around = self.picture
        self.cavity = self._with_papillary_muscles(self.blood * self._flow())
        self.wall = np.full(self.picture.shape, rng.uniform(0.10, 0.16))
        self.outer, self.inner = outer, inner
        self._compose()
        wall = (outer > 0) & (inner <= 0)
        self.labels = np.where(inner > 0, BLOOD, np.where(wall, MYOCARDIUM, 0)).astype(np.uint8)

    def insertion(self, degrees: float) -> np.ndarray:
        """Return the position of an insertion of the right ventricle, in the middle of the long axis, (3,)."""
        height = self.length_mm / 3
        radius = self.radius_mm * np.sqrt(1 - (height / self.length_mm) ** 2)
        psi = np.deg2rad(degrees + INSERTION_DEGREES)
        return np.array([radius * np.cos(psi), radius * np.sin(psi), height])

    def brighten(self, bright: Bright, *, is_scar: bool) -> np.ndarray:
        """Paint a bright part of the wall, and return where it is, bool; only a scar is labelled."""
        off = (self.degrees - bright.degrees + 180) % 360 - 180
        reach = (off / bright.half_degrees) ** 2 + ((self.level - bright.level) / bright.half_level) ** 2
        thickness = bright.transmurality * np.sqrt(np.clip(1 - reach**2, 0, 1))  # shallower towards its border
        deep = np.where(thickness > 0, self.depth - (1 - thickness), -1.0) * self.wall_mm  # mm inside its outer face
        self.wall = self._painted(self.wall, deep, bright.value)
        self._compose()
        painted: np.ndarray = (deep > 0) & (self.labels == MYOCARDIUM)
        if is_scar:
            self.labels[painted] = SCAR
        return painted

    def scar_shares(self) -> np.ndarray:
        """Return which share of each segment's wall is scar, (17,); 0 for a segment without wall."""
        scar, wall = (
            np.bincount(self.segments[chosen], minlength=18)[1:]
            for chosen in (self.labels == SCAR, self.labels >= MYOCARDIUM)
        )
        return scar / np.maximum(wall, 1)

    def _ball(self, inside_mm: float) -> np.ndarray:
        """Return how many mm each position lies inside the ventricle's outer face, moved inwards."""
        radii = np.array([self.radius_mm, self.radius_mm, self.length_mm]) - inside_mm
        return ellipsoid(self.position, np.zeros(3), radii)

    def _painted(self, picture: np.ndarray, depth_mm: np.ndarray, value: float | np.ndarray) -> np.ndarray:
        cover = coverage(depth_mm, self.softness_mm)
        return picture * (1 - cover) + value * cover

    def _paint(self, depth_mm: np.ndarray, value: float | np.ndarray) -> None:
        self.picture = self._painted(self.picture, depth_mm, value)

    def _compose(self) -> None:
        """Put wall and cavity into what is around them: where they meet, a voxel is a mixture of these two alone."""
        self.picture = self._painted(self.around, self.outer, self._painted(self.wall, self.inner, self.cavity))

    def _paint_surroundings(self, outer: np.ndarray) -> None:
        """Paint chest wall, liver, fat round the heart, and the right ventricle."""
        rng, position, size = self.rng, self.position, self.size
        below = np.array([-62.0, 20, 30]) + rng.uniform(-6, 6, 3)
        self._paint(ellipsoid(position, below, np.array([30.0, 70, 70])), rng.uniform(0.22, 0.32))  # liver, stomach
        self._paint(ellipsoid(position, np.array([10.0, 78, 20]), np.array([90.0, 24, 90])), rng.uniform(0.55, 0.8))
        self._paint(ellipsoid(position, np.array([0.0, 14, 12]), np.array([44.0, 54, 74]) * size), 0.5)  # fat
        middle = np.array([-6.0, 26, 4]) * size
        right = ellipsoid(position, middle, np.array([29.0, 28, 58]) * size)
        self._paint(right + 3, rng.uniform(0.12, 0.2))
        self._paint(right, rng.uniform(0.5, 0.62))
        self._paint(outer + 1.5, rng.uniform(0.3, 0.5))  # pericardial fat, with a bright rim here and there
        rim = np.where(np.abs((self.degrees - rng.uniform(150, 330) + 180) % 360 - 180) < 80, outer + 3.0, -30.0)
        self._paint(rim, rng.uniform(0.6, 0.85))

    def _flow(self) -> np.ndarray:
        """Return by how much blood is brighter or darker where it flows slowly or fast."""
        waves = np.ones(self.picture.shape)
        for _ in range(4):
            wave = self.rng.normal(size=3)
            wave *= 2 * np.pi / (self.rng.uniform(14, 30) * np.linalg.norm(wave))
            waves += 0.06 * np.sin(np.einsum("aijk,a->ijk", self.position, wave) + self.rng.uniform(0, 2 * np.pi))
        return waves

    def _with_papillary_muscles(self, cavity: np.ndarray) -> np.ndarray:
        """Paint two muscles that stand in the blood before the lateral and the inferior wall."""
        for degrees in (170.0, 290.0):
            psi = np.deg2rad(degrees + self.rng.uniform(-12, 12) + INSERTION_DEGREES)
            reach = (self.radius_mm - self.wall_mm) * 0.72
            centre = np.array([reach * np.cos(psi), reach * np.sin(psi), self.length_mm * 0.45])
            depth = ellipsoid(self.position, centre, np.array([4.2, 4.2, 16.0]) * self.size)
            cavity = self._painted(cavity, depth, self.rng.uniform(0.16, 0.26))
        return cavity
