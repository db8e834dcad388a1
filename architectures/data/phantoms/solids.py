"""Solids to paint phantoms with: how deep each position lies inside a shape, in mm, negative outside.

Positions have shape (3, *grid), millimetres to the patient's left, back and head; depths are of their type.
"""

from __future__ import annotations

import numpy as np


def ellipsoid(position: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return about how many mm each position lies inside an ellipsoid, negative outside."""
    centre, radii = (np.asarray(values, position.dtype)[:, None, None, None] for values in (centre, radii))
    offset = position - centre
    scaled = np.sqrt(((offset / radii) ** 2).sum(axis=0)) + 1e-9
    slope = np.sqrt(((offset / radii**2) ** 2).sum(axis=0)) + 1e-9
    return scaled * (1 - scaled) / slope


def ellipse(position: np.ndarray, centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """Return the same for a cylinder along the body."""
    return ellipsoid(position, np.array([*centre, 0.0]), np.array([*radii, 1e6]))


def tube(position: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> np.ndarray:
    """Return the same for a tube with round ends."""
    axis = np.asarray(end - start, position.dtype)
    offset = position - np.asarray(start, position.dtype)[:, None, None, None]
    along = np.clip(np.einsum("aijk,a->ijk", offset, axis) / (axis @ axis), 0, 1)
    return radius - np.linalg.norm(offset - along * axis[:, None, None, None], axis=0)


def warped(rng: np.random.Generator, position: np.ndarray) -> np.ndarray:
    """Displace positions along a few long waves, so that nothing stays a perfect ellipsoid."""
    displacement = np.zeros_like(position)
    for _ in range(4):
        wave = rng.normal(size=3)
        wave *= 2 * np.pi / (rng.uniform(50, 110) * np.linalg.norm(wave))
        phase = np.einsum("aijk,a->ijk", position, wave) + rng.uniform(0, 2 * np.pi)
        displacement += rng.uniform(-2.0, 2.0, 3)[:, None, None, None] * np.sin(phase)
    return position + displacement


def coverage(depth_mm: np.ndarray, softness_mm: float) -> np.ndarray:
    """Return how much of each voxel a shape covers, from 0 to 1, with an edge of that softness."""
    return 1 / (1 + np.exp(-np.clip(depth_mm / softness_mm, -30, 30)))
