"""A synthetic LGE cohort of the left atrium, in the LAScarQS layout: a chest in caricature, and no patient.

What makes the real task hard is in it: the atrium is as bright as the chambers and vessels around it, its wall is thin
and dark with bright scars, the coil shades the image, noise is Rician, voxels are anisotropic, slices are oblique, and
the last cases come from another scanner (other matrix, spacing, contrast, noise and axis order). What makes it
learnable is in it, too: anatomy. The atrium lies behind the aortic root, before the spine and the descending aorta.

Everything is decided by the seed. Coordinates are millimetres to the patient's left, back and head (L, P, S), with
the heart at the origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trifuse.architectures.data.layouts.split import Split
from trifuse.architectures.data.volumes.nifti import new_volume, write_image, write_labels

from .solids import coverage, ellipse, ellipsoid, tube, warped

_FULL_SCALE = 1000.0  # stored value of tissue brightness 1


@dataclass(frozen=True)
class _Scanner:
    """How a scanner samples and shows the same anatomy."""

    matrix_scale: float
    field_of_view_mm: float
    slab_mm: float
    tilt_degrees: float
    blood: float
    myocardium: float
    noise: float
    shading: float
    axis_order: tuple[int, int, int]  # which of L, P, S the file's axes i, j, k follow
    axis_signs: tuple[int, int, int]


_TRAINING_SCANNER = _Scanner(1.0, 272.0, 84.0, 6.0, 0.66, 0.16, 0.035, 0.25, (0, 1, 2), (1, 1, 1))
_TEST_SCANNER = _Scanner(7 / 6, 288.0, 90.0, 8.0, 0.60, 0.19, 0.045, 0.30, (1, 0, 2), (1, -1, -1))


def write_left_atrium_phantom(
    root: Path, cases: int = 12, seed: int = 0, size: tuple[int, int, int] = (96, 96, 14)
) -> Split:
    """Write ``train_data/train_<n>/`` folders below ``root`` and return which cases train, validate and test.

    Args:
        root: folder of the cohort, created if it does not exist.
        cases: how many; the last quarter tests and comes from another scanner, an eighth validates.
        seed: decides everything.
        size: matrix of the training scanner: columns, rows, slices. The other scanner's is a sixth finer in plane.

    Raises:
        ValueError: fewer than three cases.
    """
    if cases < 3:
        raise ValueError(f"expected at least 3 cases (one each to train, validate and test), got {cases}")
    test = max(round(cases / 4), 1)
    val = max(round(cases / 8), 1)
    names = [f"train_{number}" for number in range(1, cases + 1)]
    for number, name in enumerate(names):
        scanner = _TEST_SCANNER if number >= cases - test else _TRAINING_SCANNER
        folder = Path(root) / "train_data" / name
        folder.mkdir(parents=True, exist_ok=True)
        image, atrium, scar, affine = _scan_chest(np.random.default_rng([seed, number]), scanner, size)
        grid = new_volume(image, affine)
        for file, native in (("atriumSegImgMO", atrium), ("scarSegImgM", scar)):
            write_labels(folder / f"{file}.nii.gz", grid.geometry.to_display(native), like=grid)
        write_image(folder / "enhanced.nii.gz", grid.voxels, like=grid)
    train_ids, val_ids = names[: cases - test - val], names[cases - test - val : cases - test]
    return Split(tuple(train_ids), tuple(val_ids), tuple(names[cases - test :]))


def _scan_chest(
    rng: np.random.Generator, scanner: _Scanner, size: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return image, atrium, scar (native axis order) and affine of one chest."""
    columns, rows = (round(length * scanner.matrix_scale) for length in size[:2])
    lengths = (columns, rows, size[2])
    spacing = (scanner.field_of_view_mm / columns, scanner.field_of_view_mm / rows, scanner.slab_mm / size[2])
    shape = tuple(lengths[axis] for axis in scanner.axis_order)
    steps = np.zeros((3, 3))
    for column, (axis, sign) in enumerate(zip(scanner.axis_order, scanner.axis_signs, strict=True)):
        steps[axis, column] = sign * spacing[axis]
    steps = _rotation(rng.uniform(-1, 1, 3) * np.deg2rad(scanner.tilt_degrees)) @ steps
    centre = (np.array(shape) - 1) / 2
    grid = np.stack(np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")) - centre[:, None, None, None]
    position = np.einsum("ab,bijk->aijk", steps, grid) + rng.uniform(-4, 4, 3)[:, None, None, None]
    brightness, atrium, scar = _chest(rng, warped(rng, position), scanner, softness_mm=0.5 * min(spacing))
    image = _acquire(rng, brightness, position, scanner)
    to_ras = np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = to_ras @ steps
    affine[:3, 3] = -affine[:3, :3] @ centre + rng.uniform(-30, 30, 3)
    return image, atrium.astype(np.uint8), scar.astype(np.uint8), affine


def _chest(
    rng: np.random.Generator, position: np.ndarray, scanner: _Scanner, softness_mm: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paint the chest from the outside in; return brightness, atrium and scar."""
    blood = scanner.blood * rng.uniform(0.92, 1.08)
    muscle, fat, lung = 0.24 * rng.uniform(0.9, 1.1), 0.50 * rng.uniform(0.8, 1.2), 0.04
    dark = scanner.myocardium
    heart = rng.uniform(0.92, 1.10)  # size of the heart
    picture = np.full(position.shape[1:], 0.01)

    def jitter(*point: float, by: float = 2.5) -> np.ndarray:
        return np.array(point) * heart + rng.uniform(-by, by, 3)

    def paint(depth_mm: np.ndarray, value: float | np.ndarray) -> None:
        cover = coverage(depth_mm, softness_mm)
        picture[...] = picture * (1 - cover) + value * cover

    def chamber(point: np.ndarray, radii: tuple[float, float, float]) -> np.ndarray:
        return ellipsoid(position, point, np.array(radii) * heart * rng.uniform(0.94, 1.06, 3))

    paint(ellipse(position, (0, 6), (124, 92)), fat)
    paint(ellipse(position, (0, 6), (115, 82)), muscle)
    paint(ellipsoid(position, np.array([-68.0, 12, 10]), np.array([40.0, 62, 130])), lung)
    paint(ellipsoid(position, np.array([76.0, 22, 10]), np.array([36.0, 54, 130])), lung)
    paint(ellipse(position, (0, 62), (17, 15)), 0.34)  # vertebra
    paint(ellipse(position, (0, 82), (7, 6)), 0.55)  # spinal canal
    liver = np.array([-52.0, -8, -92 + rng.uniform(-8, 8)])
    paint(ellipsoid(position, liver, np.array([62.0, 66, 58])), 0.42)
    paint(ellipsoid(position, np.array([2.0, -14, -4]), np.array([68.0, 60, 74]) * heart), 0.36)  # fat round the heart
    left_ventricle = jitter(46, -22, -22)
    paint(chamber(left_ventricle, (31, 28, 40)), dark)  # its wall, then its blood
    paint(chamber(left_ventricle, (21, 18, 32)), blood * rng.uniform(0.95, 1.05))
    paint(chamber(jitter(2, -50, -18), (34, 17, 36)), blood * rng.uniform(0.95, 1.05))  # right ventricle
    paint(chamber(jitter(-43, -14, -6), (23, 26, 36)), blood * rng.uniform(0.95, 1.05))  # right atrium
    paint(tube(position, jitter(-40, 2, 20), jitter(-38, -2, 90), 9 * heart), blood)  # superior vena cava
    paint(tube(position, jitter(2, -22, -8), jitter(-10, -30, 70), 18 * heart), dark)  # aortic root, with its wall
    paint(tube(position, jitter(2, -22, -8), jitter(-10, -30, 70), 15 * heart), blood * rng.uniform(0.97, 1.05))
    paint(tube(position, jitter(26, -30, 24), jitter(10, -20, 75), 12 * heart), blood)  # pulmonary trunk
    paint(tube(position, jitter(26, 46, -120), jitter(22, 48, 120), 13 * heart), dark)  # descending aorta
    paint(tube(position, jitter(26, 46, -120), jitter(22, 48, 120), 11 * heart), blood)
    paint(tube(position, jitter(4, 44, -120), jitter(2, 46, 120), 6 * heart), muscle)  # oesophagus

    centre = jitter(3, 13, 0, by=3)
    depth = chamber(centre, (33, 21, 27))
    for side in (-1, 1):  # two pulmonary veins on either side
        for height in (-1, 1):
            start = centre + heart * np.array([side * 20, 8, height * 9])
            end = centre + heart * np.array([side * rng.uniform(40, 46), rng.uniform(15, 22), height * 14])
            depth = np.maximum(depth, tube(position, start, end, rng.uniform(5.5, 7.0) * heart))
    wall_mm = 3.0
    scar = np.zeros(depth.shape, bool)
    direction = (position - centre[:, None, None, None]) / np.array([33, 21, 27])[:, None, None, None]
    direction /= np.linalg.norm(direction, axis=0) + 1e-9
    for _ in range(rng.integers(2, 5)):
        towards = rng.normal(size=3)
        scar |= np.einsum("aijk,a->ijk", direction, towards / np.linalg.norm(towards)) > rng.uniform(0.86, 0.95)
    scar &= (depth <= 0) & (depth > -wall_mm)
    paint(depth + wall_mm, dark)
    paint(np.where(scar, wall_mm, -30.0), rng.uniform(0.95, 1.1))
    paint(depth, blood * rng.uniform(0.96, 1.04))
    return picture, depth > 0, scar


def _acquire(rng: np.random.Generator, brightness: np.ndarray, position: np.ndarray, scanner: _Scanner) -> np.ndarray:
    """Shade, add Rician noise, and store as 16-bit integers."""
    slope = rng.uniform(-1, 1, 3) * scanner.shading / np.array([100, 100, 60])
    shading = np.exp(np.einsum("aijk,a->ijk", position, slope) - scanner.shading * (position[1] / 100) ** 2)
    signal = brightness * shading
    real, imaginary = rng.normal(0, scanner.noise * rng.uniform(0.8, 1.3), (2, *signal.shape))
    noisy = np.hypot(signal + real, imaginary)
    return np.clip(np.round(noisy * _FULL_SCALE), 0, 32767).astype(np.int16)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Return the rotation by three angles in radians about L, P and S."""
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        rotation = turn @ rotation
    return rotation
