"""A synthetic cohort of myocardial scar, in the layout of lge_ecg.py: short-axis LGE stacks, each with an ECG.

What makes the real task hard is in it: scar lies under the inner wall and is about as bright as the blood beside it,
papillary muscles break the cavity's outline, the coil shades the image, noise is Rician, slices are thick, and some
walls have an artefact as bright as a scar. What makes it learnable is in it, too. The wall is a ring, so whoever knows
its segments knows where blood ends; and the ECG says which territory is scarred, the better the fewer days lie between
it and the MRI, so that a scar can be told from an artefact elsewhere.

Everything is decided by the seed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from trifuse.architectures.data.layouts.lge_ecg import TABLE
from trifuse.architectures.data.layouts.split import Split
from trifuse.architectures.data.volumes.nifti import new_volume, write_image, write_labels
from trifuse.architectures.storage.atomic_files import write_text

from .ecg import RATE_HZ, SyntheticEcg, synthetic_ecg
from .heart_anatomy import ANTERIOR, LONG_AXIS, SEPTAL, SEPTUM_DEGREES, TERRITORY_DEGREES, Bright, Heart
from .solids import warped

SLICE_MM = 8.0
FIELD_MM = (138.0, 162.0)
"""Side of the field of view, shortest and longest."""
INTERVAL_BINS_DAYS = ((0, 6), (7, 13), (14, 20), (21, 29), (30, 59), (60, 90))
"""Every sixth case lies in one of these, first and last day included."""

_FULL_SCALE = 1000.0  # stored value of brightness 1
_NO_ECG_EVERY = 14  # one case of so many has no ECG
_ARTEFACT_SHARE = 0.35  # of the cases
_NOISE, _SHADING = 0.045, 0.2
_PLANES = 3  # a slice's brightness is the mean of so many planes within it
_AXES = (((0, 1, 2), (1, 1, 1)), ((1, 0, 2), (1, -1, -1)), ((0, 1, 2), (-1, -1, 1)))  # which of the scanner's
# columns, rows and slices the file's axes i, j, k follow, and which way
_HEADER = (
    *("case_id", "split", "lge_path", "seg_path", "ecg_path", "ecg_rate_hz", "mri_date", "ecg_date"),
    *("rv_ant_x", "rv_ant_y", "rv_inf_x", "rv_inf_y"),
)


def write_scar_phantom(
    root: Path,
    cases: int = 40,
    seed: int = 0,
    size: tuple[int, int, int] = (96, 96, 8),
    *,
    val: int | None = None,
    test: int | None = None,
) -> Split:
    """Write ``cases.csv``, ``lge/``, ``seg/`` and ``ecg/`` below ``root``; return the split that the table holds.

    Args:
        root: folder of the cohort, created if it does not exist.
        cases: how many.
        seed: decides everything.
        size: columns, rows and slices of every case.
        val: how many validate, a tenth without it.
        test: how many test, a fifth without it; these are the last, those that validate come before them.

    Raises:
        ValueError: no case is left to train on.
    """
    val = max(round(cases / 10), 1) if val is None else val
    test = max(round(cases / 5), 1) if test is None else test
    if min(val, test) < 0 or cases - val - test < 1:
        raise ValueError(f"expected more cases than validate ({val}) and test ({test}), got {cases}")
    names = tuple(f"case{number:03d}" for number in range(1, cases + 1))
    split = Split(names[: cases - val - test], names[cases - val - test : cases - test], names[cases - test :])
    return write_scar_cohort(root, split, lambda number, name: _write_case(root, name, number, seed, size))


def write_scar_cohort(root: Path, split: Split, write_case: Callable[[int, str], Mapping[str, object]]) -> Split:
    """Write a cohort case by case, and last its ``cases.csv``; return the split.

    Args:
        root: folder of the cohort, created if it does not exist.
        split: the cases' names, in the order of their numbers: those that train, validate, test.
        write_case: writes files of a case, given its number and name; returns the table's cells by column.
    """
    for folder in ("lge", "seg", "ecg"):
        (Path(root) / folder).mkdir(parents=True, exist_ok=True)
    parts = {name: part for part in ("train", "val", "test") for name in getattr(split, part)}
    lines = []
    for number, (name, part) in enumerate(parts.items()):
        line = {"case_id": name, "split": part, **write_case(number, name)}
        lines.append([line.get(column, "") for column in _HEADER])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([_HEADER, *lines])
    write_text(Path(root) / TABLE, table.getvalue())
    return split


def _write_case(root: Path, name: str, number: int, seed: int, size: tuple[int, int, int]) -> Mapping[str, object]:
    """Write image, labels and ECG of a case; return its line of the table."""
    rng = np.random.default_rng([seed, number])
    scan = scanned(rng, number, size, _infarct)
    first, last = INTERVAL_BINS_DAYS[number % len(INTERVAL_BINS_DAYS)]
    days = int(rng.integers(first, last + 1))
    mri = draw_mri_date(rng)
    line = {**write_scan(root, name, scan), "mri_date": mri.isoformat()}
    if number % _NO_ECG_EVERY == _NO_ECG_EVERY - 1:
        return line
    ecg_date = draw_ecg_date(rng, mri, days)
    ecg = synthetic_ecg(rng, scan.scar_shares, days)
    return {**line, "ecg_date": ecg_date.isoformat(), **_write_ecg(root, name, number, ecg, rng)}


def draw_mri_date(rng: np.random.Generator) -> date:
    """Draw a day on which a heart was scanned."""
    return date(2020, 1, 1) + timedelta(days=int(rng.integers(0, 1500)))


def draw_ecg_date(rng: np.random.Generator, mri: date, days: int) -> date:
    """Return a day so many before or after the MRI."""
    return mri + timedelta(days=days if rng.random() < 0.5 else -days)


def write_scan(root: Path, name: str, scan: Scan) -> dict[str, object]:
    """Write image and labels of a case; return its paths and landmarks as cells of the table."""
    grid = new_volume(scan.image, scan.affine)
    write_image(root / "lge" / f"{name}.nii.gz", grid.voxels, like=grid)
    write_labels(root / "seg" / f"{name}.nii.gz", grid.geometry.to_display(scan.labels), like=grid)
    marks = dict(zip(_HEADER[-4:], (f"{value:.2f}" for value in scan.landmarks), strict=True))
    return {"lge_path": f"lge/{name}.nii.gz", "seg_path": f"seg/{name}.nii.gz", **marks}


def _write_ecg(root: Path, name: str, number: int, ecg: SyntheticEcg, rng: np.random.Generator) -> dict[str, object]:
    """Write a median beat, or a record with its rate in the table, or one that says its rate itself."""
    signal = ecg.median_beat(rng) if number % 3 == 0 else ecg.record(rng)
    if number % 3 == 2:
        np.savez(root / "ecg" / f"{name}.npz", signal=signal, rate=RATE_HZ)
        return {"ecg_path": f"ecg/{name}.npz"}
    np.save(root / "ecg" / f"{name}.npy", signal)
    return {"ecg_path": f"ecg/{name}.npy", "ecg_rate_hz": RATE_HZ}


@dataclass(frozen=True, eq=False)
class Scan:
    """A short-axis stack of one heart, its arrays in the native axis order of a file.

    Attributes:
        image: int16 brightness.
        labels: uint8, 0 background, 1 blood pool, 2 myocardium, 3 scar, and what else was painted.
        affine: of the voxels, 4 x 4, RAS in mm.
        landmarks: both insertions of the right ventricle, voxel indices in plane, (4,).
        scar_shares: share of each AHA segment that is scar, (17,).
    """

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    landmarks: list[float]
    scar_shares: np.ndarray


def scanned(
    rng: np.random.Generator,
    number: int,
    size: tuple[int, int, int],
    paint: Callable[[np.random.Generator, Heart], None],
    field_mm: tuple[float, float] = FIELD_MM,
) -> Scan:
    """Draw a heart, let ``paint`` put scar into it, and scan it.

    Args:
        rng: decides on heart, place and noise.
        number: of the case; decides which way the file's axes run.
        size: columns, rows and slices.
        paint: changes the heart that it is given.
        field_mm: shortest and longest side of the field of view.
    """
    spacing = np.array([*rng.uniform(*field_mm) / np.array(size[:2]), SLICE_MM])
    fine = (size[0], size[1], size[2] * _PLANES)
    index = np.stack(np.meshgrid(*(np.arange(length) for length in fine), indexing="ij")) + 0.5
    scanner = (index - np.array(fine)[:, None, None, None] / 2) * (spacing / (1, 1, _PLANES))[:, None, None, None]
    turn = _rotation((0, 0, rng.uniform(-20, 20))) @ np.array([[0, -1, 0], [-1, 0, 0], [0, 0, 1]])
    shift = np.array([*rng.uniform(-9, 9, 2), SLICE_MM * size[2] / 2 + rng.uniform(-4, 2)])
    place = np.einsum("ab,bijk->aijk", turn, scanner) + shift[:, None, None, None]
    position = warped(rng, place)
    heart = Heart(rng, position, softness_mm=0.45 * spacing[0])
    paint(rng, heart)
    middle = (..., slice(_PLANES // 2, None, _PLANES))
    image = _acquire(rng, heart.picture.reshape(*size, _PLANES).mean(axis=3), scanner[middle])
    to_ras = np.diag([-1.0, -1.0, 1.0])
    in_patient = np.stack([ANTERIOR, SEPTAL, LONG_AXIS], axis=1)
    steps = to_ras @ _rotation(rng.uniform(-5, 5, 3)) @ in_patient @ turn * spacing
    marks = [_nearest(position[middle], heart.insertion(degrees)) for degrees in (0.0, SEPTUM_DEGREES)]
    order, ways = _AXES[number % len(_AXES)]
    turned = [axis for axis, way in enumerate(ways) if way < 0]
    corner = np.zeros(3)  # where the file begins, in the scanner's indices
    corner[[order[axis] for axis in turned]] = [size[order[axis]] - 1 for axis in turned]
    affine = np.eye(4)
    affine[:3, :3] = steps[:, order] * ways
    affine[:3, 3] = steps @ (corner - (np.array(size) - 1) / 2) + rng.uniform(-30, 30, 3)
    landmarks = [abs(mark[order[axis]] - corner[order[axis]]) for mark in marks for axis in (0, 1)]
    labels: np.ndarray = heart.labels[middle]
    stored: np.ndarray = np.clip(np.round(image * _FULL_SCALE), 0, 32767).astype(np.int16)
    native_image, native_labels = (np.flip(array.transpose(order), tuple(turned)) for array in (stored, labels))
    return Scan(native_image, native_labels, affine, landmarks, heart.scar_shares())


def _infarct(rng: np.random.Generator, heart: Heart) -> None:
    """Paint one scar, and in some hearts an artefact in another artery's territory."""
    value = heart.blood * rng.uniform(1.0, 1.28)
    territory, other = rng.permutation(TERRITORY_DEGREES)[:2]
    if rng.random() < _ARTEFACT_SHARE:
        heart.brighten(_bright(rng, other, value * rng.uniform(0.95, 1.05)), is_scar=False)
    heart.brighten(_bright(rng, territory, value), is_scar=True)


def _bright(rng: np.random.Generator, territory: float, value: float) -> Bright:
    return Bright(
        degrees=territory + rng.uniform(-22, 22),
        level=rng.uniform(0.2, 0.75),
        half_degrees=rng.uniform(42, 75),
        half_level=rng.uniform(0.4, 0.8),
        transmurality=rng.uniform(0.5, 1.0),
        value=value,
    )


def _acquire(rng: np.random.Generator, brightness: np.ndarray, scanner: np.ndarray) -> np.ndarray:
    """Shade, and add Rician noise."""
    slope = rng.uniform(-1, 1, 3) * _SHADING / np.array([70, 70, 60])
    signal = brightness * np.exp(np.einsum("aijk,a->ijk", scanner, slope))
    real, imaginary = rng.normal(0, _NOISE * rng.uniform(0.8, 1.25), (2, *signal.shape))
    return np.hypot(signal + real, imaginary)


def _nearest(position: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Return the indices in plane of the pixel whose position is nearest to a point."""
    distance = np.linalg.norm(position - point[:, None, None, None], axis=0)
    return np.array(np.unravel_index(distance.argmin(), distance.shape)[:2])


def _rotation(degrees: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the rotation by three angles about the three axes, one after the other."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        rotation = turn @ rotation
    return rotation
