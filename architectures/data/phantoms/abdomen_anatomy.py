"""The abdomen that `abdomen_phantom` scans: trunk, bowel and eight organs, painted from the outside in.

Coordinates are millimetres to the patient's left, back and head (L, P, S), with the origin before the first lumbar
vertebra; densities are Hounsfield units after contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from trifuse.architectures.data.layouts.synapse import SYNAPSE_ORGANS

from .solids import coverage, ellipse, ellipsoid, tube

ORGANS = {organ: label for label, organ in enumerate(SYNAPSE_ORGANS, start=1)}
_AIR, _LUNG, _FAT, _MUSCLE, _BONE, _FLUID, _BILE = -1000.0, -820.0, -95.0, 68.0, 260.0, 30.0, 8.0

Point = tuple[float, float, float]


class Abdomen:
    """Densities and labels on a grid of positions, shape (3, *grid); every solid covers what was painted before.

    Attributes:
        hu: density of every voxel.
        labels: organ of every voxel, 0 where there is none.
    """

    def __init__(self, rng: np.random.Generator, position: np.ndarray, softness_mm: float) -> None:
        self.rng = rng
        self.position = position.astype(np.float32)
        self.softness_mm = softness_mm
        self.hu = np.full(position.shape[1:], _AIR, np.float32)
        self.labels = np.zeros(position.shape[1:], np.uint8)
        self.contrast = rng.uniform(0.75, 1.2)  # dose and timing: how much brighter than muscle an organ gets
        self._paint_trunk()
        self._paint_bowel()
        self._paint_organs()

    def _paint(self, depth_mm: np.ndarray, hu: float | np.ndarray, organ: str | None = None) -> None:
        cover = coverage(depth_mm, self.softness_mm)
        self.hu = self.hu * (1 - cover) + hu * cover
        self.labels[depth_mm > 0] = ORGANS[organ] if organ else 0

    def _enhanced(self, hu: float) -> float:
        return _MUSCLE + (hu - _MUSCLE) * self.contrast + self.rng.normal(0, 6)

    def _near(self, point: Point, by: float = 4.0) -> np.ndarray:
        return np.array(point) + self.rng.uniform(-by, by, 3)

    def _ball(self, centre: np.ndarray, radii: Point, vary: float = 0.1) -> np.ndarray:
        return ellipsoid(self.position, centre, np.array(radii) * self.rng.uniform(1 - vary, 1 + vary, 3))

    def _chain(self, points: Sequence[np.ndarray], radii: Sequence[float]) -> np.ndarray:
        parts = [tube(self.position, *ends, radius) for ends, radius in zip(pairwise(points), radii, strict=True)]
        return np.maximum.reduce(parts)

    def _texture(self, wavelength_mm: float, hu: float, waves: int = 5) -> np.ndarray:
        """Return a blotchy pattern of about that size and that standard deviation."""
        pattern = np.zeros_like(self.hu)
        for _ in range(waves):
            wave = self.rng.normal(size=3)
            wave *= 2 * np.pi / (wavelength_mm * self.rng.uniform(0.8, 1.3) * np.linalg.norm(wave))
            pattern += np.sin(
                np.einsum("aijk,a->ijk", self.position, wave.astype(np.float32)) + self.rng.uniform(0, 2 * np.pi)
            )
        return hu * float(np.sqrt(2 / waves)) * pattern

    def _paint_trunk(self) -> None:
        """Skin, muscles, ribs, lungs, the fat of the belly, and the spine."""
        rng, position = self.rng, self.position
        thickness = rng.uniform(5, 13)  # of the fat below the skin
        self._paint(ellipse(position, (0, 0), (132 + thickness, 92 + thickness)), _FAT)
        wall = ellipse(position, (0, 0), (132, 92))
        streaks = self._texture(16, 14)
        self._paint(wall, _MUSCLE + streaks)
        ribs = (
            5
            - np.abs(wall - 9)
            - 12 * (np.sin((position[2] + 0.5 * position[1]) / 4.6) < 0.3)
            - 20 * (position[2] < -40)
        )
        self._paint(ribs, _BONE)
        self.cavity = ellipse(position, (0, -6), (116, 76))
        self._paint(self.cavity, _FAT + self._texture(20, 8))
        for side in (-1, 1):
            self._paint(ellipsoid(position, np.array([side * 72.0, 30, 150]), np.array([48.0, 62, 74])), _LUNG)
            self._paint(
                tube(position, np.array([side * 38.0, 60, 40]), np.array([side * 50.0, 50, -140]), 19),
                _MUSCLE + streaks,
            )
            self._paint(
                tube(position, np.array([side * 32.0, 82, 140]), np.array([side * 32.0, 80, -140]), 22),
                _MUSCLE + streaks,
            )
        disc = np.abs((position[2] + rng.uniform(0, 34)) % 34 - 17) < 4
        self._paint(ellipse(position, (0, 58), (22, 17)), np.where(disc, 90.0, 190 + self._texture(12, 25)))
        self._paint(ellipse(position, (0, 88), (6, 14)), _BONE)
        self._paint(ellipse(position, (0, 80), (9, 8)), _FLUID)

    def _paint_bowel(self) -> None:
        """Loops of bowel at random below the stomach, and the colon round them; some hold gas, some contrast medium."""
        rng = self.rng
        contents = self._texture(14, 22)
        for _ in range(20):
            start = rng.uniform((-80, -62, -130), (85, 12, 10))
            end = start + rng.normal(0, 16, 3)
            loop = np.minimum(tube(self.position, start, end, rng.uniform(9, 14)), self.cavity)
            self._paint(loop, rng.uniform(35, 150) + contents)
        colon = [
            (-98, 12, -130),
            (-96, 0, -40),
            (-60, -50, -35),
            (0, -62, -42),
            (62, -55, -20),
            (100, 8, 5),
            (100, 18, -130),
        ]
        path = [self._near(point, 6) for point in colon]
        self._paint(self._chain(path, [18] * 6), rng.uniform(60, 110) + self._texture(16, 30))
        for point in path[1:5]:
            self._paint(self._ball(point - np.array([0, 6, 0]), (13, 8, 20)), -600.0)

    def _paint_organs(self) -> None:
        """The organs, and the vein and the gut between them that look like them."""
        self._paint_liver()
        self._paint_spleen()
        self._paint_stomach()
        blood = self._enhanced(165)
        self._paint(self._chain([self._near((-22, 32, 140)), self._near((-20, 34, -140))], [12]), blood - 30)
        self._paint_kidneys()
        path = [
            self._near((-42, -8, 10)),
            self._near((-44, 12, -10)),
            self._near((-38, 14, -45)),
            self._near((0, 20, -52)),
        ]
        self._paint(self._chain(path, [12, 12, 11]), self.rng.uniform(50, 120) + self._texture(12, 20))  # duodenum
        self._paint_pancreas()
        self._paint_gallbladder()
        bend = self._near((9, 29, 0), 3)
        aorta = self._chain(
            [self._near((12, 36, 150), 3), bend, self._near((4, 31, -150), 3)], [self.rng.uniform(12, 15)] * 2
        )
        self._paint(aorta, blood, "aorta")

    def _paint_liver(self) -> None:
        shift = self.rng.uniform(-6, 6, 3)
        depth = np.maximum(
            self._ball(np.array([-66, 2, 34]) + shift, (52, 64, 72)),
            self._ball(np.array([-12, -34, 52]) + shift, (56, 30, 34)),
        )
        self._paint(depth, self._enhanced(98) + self._texture(34, 9), "liver")
        for _ in range(7):  # hepatic and portal veins
            start = np.array([-40, 0, 50]) + shift + self.rng.normal(0, 14, 3)
            veins = np.minimum(tube(self.position, start, start + self.rng.normal(0, 40, 3), 4.5), depth - 4)
            self._paint(veins, self._enhanced(150), "liver")

    def _paint_spleen(self) -> None:
        centre = self._near((92, 34, 46), 6)
        depth = self._ball(centre, (27, 44, 46))
        depth = np.minimum(depth, -ellipsoid(self.position, centre - np.array([34, 14, 0]), np.array([30.0, 40, 60])))
        self._paint(depth, self._enhanced(116) + self._texture(11, 16), "spleen")

    def _paint_stomach(self) -> None:
        fundus, body, antrum = self._near((54, 0, 74), 6), self._near((56, -34, 30), 6), self._near((-2, -44, 2), 6)
        depth = np.maximum(self._ball(fundus, (32, 34, 34)), self._chain([fundus, body, antrum], [26, 19]))
        self._paint(depth, self._enhanced(95), "stomach")  # its wall, then what is in it
        fill = self.rng.uniform(40, 110)
        self._paint(depth - 5, fill + self._texture(13, 20), "stomach")
        level = -self.position[1] - self.rng.uniform(32, 42)  # gas rises to the belly's side
        self._paint(np.minimum(depth - 5, level), -700.0, "stomach")

    def _paint_kidneys(self) -> None:
        for side, name, height in ((1, "left kidney", -8), (-1, "right kidney", -26)):
            centre = self._near((side * 62, 44, height), 6)
            depth = self._ball(centre, (26, 24, 50))
            self._paint(depth, self._enhanced(160), name)  # cortex, then medulla, then the fat of the sinus
            self._paint(depth - 8, self._enhanced(95) + self._texture(13, 16), name)
            sinus = ellipsoid(self.position, centre - np.array([side * 22, 2, 0]), np.array([12.0, 7, 16]))
            self._paint(sinus, _FAT)

    def _paint_pancreas(self) -> None:
        path = [(-28, 4, -22), (-20, -2, -2), (8, -10, 8), (40, 8, 18), (70, 22, 30)]
        depth = self._chain([self._near(point, 4) for point in path], [17, 14, 14, 14])
        self._paint(depth, self._enhanced(92) + self._texture(7, 20), "pancreas")

    def _paint_gallbladder(self) -> None:
        neck, fundus = self._near((-42, -28, 8), 4), self._near((-52, -52, -28), 5)
        depth = self._chain([neck, fundus], [self.rng.uniform(15, 19)])
        self._paint(depth, self._enhanced(85), "gallbladder")  # its wall, then bile
        self._paint(depth - 3, _BILE + self.rng.normal(0, 5), "gallbladder")
