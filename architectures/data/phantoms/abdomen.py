"""A synthetic abdomen CT in the layout of TransUNet's Synapse package: anatomy in caricature, and no patient.

What makes the real task hard is in it: the eight organs, the muscles and the bowel have nearly the same density, so
that no window of intensities separates any organ; patients, doses of contrast, noise and shading vary; bowel loops lie
wherever there is room; and the test cases come from another scanner. What makes it learnable is in it, too: every organ
has its place, its shape and its texture.

Everything is decided by the seed. Coordinates are millimetres to the patient's left, back and head (L, P, S), with the
origin before the first lumbar vertebra. Slices are stored as one sees them: the patient's right at the left, the belly
at the top; the first slice lies nearest to the feet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trifuse.architectures.data.layouts.export import write_synapse_package
from trifuse.architectures.data.layouts.split import Split
from trifuse.architectures.data.layouts.synapse import ABDOMEN_WINDOW_HU

from .abdomen_anatomy import Abdomen
from .solids import warped


@dataclass(frozen=True)
class _Scanner:
    """How a scanner samples and shows the same anatomy."""

    field_of_view_mm: float
    noise_hu: float
    shading_hu: float
    offset_hu: float
    softness_vox: float


_TRAINING_SCANNER = _Scanner(320.0, 26.0, 14.0, 0.0, 0.5)
_TEST_SCANNER = _Scanner(332.0, 32.0, 18.0, 5.0, 0.6)
_SLAB_MM = 208.0
_REACH_MM = 150.0  # where the shading reaches its full strength


def write_abdomen_phantom(
    root: Path, *, cases: int = 20, seed: int = 0, size: tuple[int, int, int] = (96, 96, 24)
) -> Split:
    """Write ``train_npz/``, ``test_vol_h5/`` and ``lists_Synapse/`` below ``root``; return their cases.

    Args:
        root: folder of the cohort, created if it does not exist.
        cases: how many; the last quarter tests and comes from another scanner, an eighth validates.
        seed: decides everything.
        size: columns, rows and slices of every case.

    Raises:
        ValueError: fewer than three cases.
        MissingExtra: h5py is not installed.
    """
    if cases < 3:
        raise ValueError(f"expected at least 3 cases (one each to train, validate and test), got {cases}")
    test, val = max(round(cases / 4), 1), max(round(cases / 8), 1)
    names = tuple(f"case{number:04d}" for number in range(1, cases + 1))
    split = Split(names[: cases - test - val], names[cases - test - val : cases - test], names[cases - test :])
    scans = (
        (name, *_scan(np.random.default_rng([seed, number]), scanner, size))
        for number, name in enumerate(names)
        for scanner in [_TEST_SCANNER if name in split.test else _TRAINING_SCANNER]
    )
    write_synapse_package(Path(root), scans, split.test)
    return split


def _scan(rng: np.random.Generator, scanner: _Scanner, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the image in [0, 1] and the labels of one abdomen, both (slices, rows, columns)."""
    columns, rows, depth = size
    spacing = np.array([scanner.field_of_view_mm / columns, scanner.field_of_view_mm / rows, _SLAB_MM / depth])
    index = np.stack(np.meshgrid(*(np.arange(length) for length in (depth, rows, columns)), indexing="ij"))[::-1]
    centre = (np.array(size) - 1) / 2
    position = (index - centre[:, None, None, None]) * spacing[:, None, None, None]
    table = position + rng.uniform((-8, -8, -12), (8, 8, 12))[:, None, None, None]  # nobody lies in the middle of it
    stature = rng.uniform((0.92, 0.92, 0.94), (1.08, 1.08, 1.06))
    abdomen = Abdomen(rng, warped(rng, table) / stature[:, None, None, None], scanner.softness_vox * min(spacing))
    hu = abdomen.hu + scanner.offset_hu + rng.normal(0, 4)
    tilt = rng.uniform(-1, 1, 2) @ position[:2].reshape(2, -1)
    cup = (position[:2] ** 2).sum(axis=0) / _REACH_MM**2 - 1  # beams harden on their way to the middle
    hu = hu + scanner.shading_hu * (tilt.reshape(hu.shape) / _REACH_MM + cup)
    hu = hu + rng.normal(0, scanner.noise_hu * rng.uniform(0.85, 1.2), hu.shape)
    low, high = ABDOMEN_WINDOW_HU
    image = (np.clip(hu, low, high) - low) / (high - low)
    return image.astype(np.float32), abdomen.labels
