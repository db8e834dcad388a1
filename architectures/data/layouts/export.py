"""Any cohort that can be read, written in the layout of nnU-Net's raw data sets or of TransUNet's Synapse package.

Cases are written by their classes, not by the label values that they came with. The folder appears whole or not at all.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.architectures.data.volumes.files import NonFinite
from trifuse.architectures.data.volumes.nifti import write_image, write_labels
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.storage.atomic_files import atomic_write, temporary_path, write_json, write_text
from trifuse.architectures.storage.text import listed
from trifuse.kernels.errors import DataError, MissingExtra, require

from .cohort import Cohort, Split
from .layout import Layout
from .nnunet import LAYOUT as NNUNET
from .nnunet import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS
from .nnunet_json import DESCRIPTION_FILE
from .read_case import load_case
from .synapse import (
    ABDOMEN_WINDOW_HU,
    LIST_FOLDER,
    SYNAPSE_ORGANS,
    TEST_FOLDER,
    TEST_LIST,
    TRAIN_FOLDER,
    TRAIN_LIST,
    VOLUME_SUFFIX,
)
from .synapse import LAYOUT as SYNAPSE

_ENDING = ".nii.gz"
_SLICE_NAME = "{}_slice{:03d}"


def write_nnunet(
    cohort: Cohort,
    out: Path,
    split: Split | None = None,
    *,
    channel_name: str = "image",
    nonfinite: NonFinite = "error",
) -> Path:
    """Write a cohort as a raw data set of nnU-Net and return its folder.

    Cases that train or validate go to ``imagesTr``, those that test to ``imagesTs``; geometries stay what they are.

    Args:
        cohort: whose cases all have labels.
        out: a folder that is new or empty.
        split: which cases test; by default the cohort's own split, else none does.
        channel_name: what the image shows; nnU-Net scales a channel named ``"CT"`` in a way of its own.
        nonfinite: what to do with NaN and infinite voxels.

    Raises:
        DataError: the folder is not empty, or cases are unusable; all of them are named.
    """
    split = split or cohort.split or _all_train(cohort)

    def write(folder: Path) -> None:
        for part in (TRAIN_IMAGES, TRAIN_LABELS, *((TEST_IMAGES, TEST_LABELS) if split.test else ())):
            (folder / part).mkdir()
        train = (*split.train, *split.val)
        test = set(split.test)
        for name, image, labels in _cases(cohort, (*train, *split.test), nonfinite):
            images, truths = (TEST_IMAGES, TEST_LABELS) if name in test else (TRAIN_IMAGES, TRAIN_LABELS)
            write_image(folder / images / f"{name}_0000{_ENDING}", _as_integers(image.voxels), like=image)
            write_labels(folder / truths / f"{name}{_ENDING}", labels.voxels, like=labels)
        description = {
            "channel_names": {"0": channel_name},
            "labels": {name: value for value, name in enumerate(cohort.class_names)},
            "numTraining": len(train),
            "file_ending": _ENDING,
        }
        write_json(folder / DESCRIPTION_FILE, description)

    return _write_whole(Path(out), write)


def write_synapse(
    cohort: Cohort,
    out: Path,
    split: Split | None = None,
    *,
    window: tuple[float, float] | None = ABDOMEN_WINDOW_HU,
    nonfinite: NonFinite = "error",
) -> Path:
    """Write a cohort as TransUNet's Synapse package, in the label space ``transunet9``, and return its folder.

    Cases that train or validate become slices, those that test volumes. Values are clipped to ``window`` and every
    volume is scaled to [0, 1]; the size of its voxels is lost.

    Args:
        cohort: whose cases all have labels and whose classes are organs of the package, by whatever spelling.
        out: a folder that is new or empty.
        split: which cases test; by default the cohort's own split, else none does.
        window: intensities are clipped to these, lowest and highest, in the image's unit (HU); None clips nothing.
        nonfinite: what to do with NaN and infinite voxels.

    Raises:
        DataError: the folder is not empty, a class is no such organ, or cases are unusable; all of them are named.
        MissingExtra: h5py is not installed.
    """
    split = split or cohort.split or _all_train(cohort)
    if split.test:
        require("h5py", "h5", "writing test volumes")
    values = _organ_values(cohort)

    def write(folder: Path) -> None:
        cases = _cases(cohort, (*split.train, *split.val, *split.test), nonfinite)
        prepared = ((name, _unit_range(image.voxels, window), values[labels.voxels]) for name, image, labels in cases)
        write_synapse_package(folder, prepared, set(split.test))

    return _write_whole(Path(out), write)


def write_synapse_package(
    folder: Path, cases: Iterable[tuple[str, np.ndarray, np.ndarray]], test: Collection[str]
) -> None:
    """Write names, images and labels (D, H, W), prepared as the package has them; those named in ``test`` as volumes.

    Raises:
        MissingExtra: h5py is not installed.
    """
    for part in (TRAIN_FOLDER, TEST_FOLDER, LIST_FOLDER):
        (folder / part).mkdir(parents=True, exist_ok=True)
    slices, volumes = [], []
    for name, image, labels in cases:
        if name in test:
            volumes.append(name)
            _write_h5(folder / TEST_FOLDER / f"{name}{VOLUME_SUFFIX}", image, labels)
            continue
        for number, (plane, organs) in enumerate(zip(image, labels, strict=True)):
            slices.append(_SLICE_NAME.format(name, number))
            with atomic_write(folder / TRAIN_FOLDER / f"{slices[-1]}.npz") as stream:
                np.savez_compressed(stream, image=plane, label=organs)
    for file, names in ((TRAIN_LIST, slices), (TEST_LIST, volumes)):
        write_text(folder / LIST_FOLDER / file, "".join(f"{name}\n" for name in names))


WRITERS: dict[str, Callable[..., Path]] = {NNUNET.name: write_nnunet, SYNAPSE.name: write_synapse}
"""Writes a cohort in a layout that declares an ``export``, by the layout's name."""


def write_cohort(
    layout: Layout, cohort: Cohort, out: Path, split: Split | None = None, *, nonfinite: NonFinite, **options: Any
) -> Path:
    """Write a cohort in a layout that can be written, and return the folder.

    Args:
        layout: has an ``export``.
        cohort, out, split, nonfinite: see `write_nnunet` and `write_synapse`.
        options: of the layout's ``export``, by name; None means that the option is not given.

    Raises:
        DataError, MissingExtra: see `write_nnunet` and `write_synapse`.
    """
    said = {name: value for name, value in options.items() if value is not None}
    return WRITERS[layout.name](cohort, out, split, nonfinite=nonfinite, **said)


def _all_train(cohort: Cohort) -> Split:
    return Split(tuple(case.case_id for case in cohort.cases), (), ())


def _cases(cohort: Cohort, case_ids: tuple[str, ...], nonfinite: NonFinite) -> Iterator[tuple[str, Volume, Volume]]:
    """Read the cases one by one; those that cannot be used are reported together at the end."""
    problems = []
    for case_id in case_ids:
        case = cohort.case(case_id)
        try:
            image, labels = load_case(cohort, case, nonfinite=nonfinite)
            if labels is None:
                raise DataError(case.image, "label", got="none", want="a label map")
        except DataError as error:
            problems.append(error)
            continue
        yield case_id, image, labels
    if problems:
        raise DataError.merge(problems)


def _write_whole(out: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a folder beside ``out``, which takes its name when it is complete."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(out, "output folder", got="something there", want="a new or an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_path(out)
    folder.mkdir()
    try:
        write(folder)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out


def _as_integers(voxels: np.ndarray) -> np.ndarray:
    """Return whole numbers as 16-bit integers, as scanners store them; anything else as it is."""
    whole = voxels.astype(np.int16) if abs(voxels).max() < 2**15 else voxels
    return whole if np.array_equal(whole, voxels) else voxels


def _unit_range(voxels: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    clipped = voxels if window is None else voxels.clip(*window)
    low, high = float(clipped.min()), float(clipped.max())
    scaled = (clipped - low) / (high - low) if high > low else np.zeros_like(clipped)
    return scaled.astype(np.float32)


def _organ_values(cohort: Cohort) -> np.ndarray:
    """Return the value in the package of each class of the cohort."""
    organs = {_words(name): value for value, name in enumerate(SYNAPSE_ORGANS, start=1)}
    if strangers := [name for name in cohort.class_names[1:] if _words(name) not in organs]:
        want = f"some of {', '.join(SYNAPSE_ORGANS)}"
        hint = "name the labels: targets='left kidney=3'"
        raise DataError(cohort.root, "classes", got=listed(map(repr, strangers)), want=want, hint=hint)
    return np.array([0, *(organs[_words(name)] for name in cohort.class_names[1:])], np.uint8)


def _words(name: str) -> frozenset[str]:
    """Return the words of a name, so that ``kidney_left`` and ``left kidney`` are the same."""
    return frozenset(re.split(r"[\W_]+", name.casefold()))


def _write_h5(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise MissingExtra("h5py", "h5", f"writing {path.name}") from error
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_dataset("image", data=image, compression="gzip")
        file.create_dataset("label", data=label, compression="gzip")
    with atomic_write(path) as stream:
        stream.write(content.getbuffer())
