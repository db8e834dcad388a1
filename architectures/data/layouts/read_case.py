"""A case's voxels: its image, and its labels as the classes of its cohort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from trifuse.architectures.data.volumes.arrays import array_size, read_array_image, read_array_labels
from trifuse.architectures.data.volumes.files import NonFinite
from trifuse.architectures.data.volumes.nifti import read_image, read_labels, stored_size
from trifuse.architectures.data.volumes.volume import StoredSize, Volume
from trifuse.architectures.storage.text import count, listed
from trifuse.kernels.errors import DataError

from .cohort import Case, Cohort


def load_case(cohort: Cohort, case: Case, *, nonfinite: NonFinite = "error") -> tuple[Volume, Volume | None]:
    """Read a case: its image, and its labels as uint8 classes on the image's grid (None if it has none).

    Raises:
        DataError: a file is unusable, the grids differ, or a label value has no class.
    """
    image, raw = load_raw_case(case, nonfinite=nonfinite)
    return image, None if raw is None else map_labels(cohort, raw)


def load_raw_case(case: Case, *, nonfinite: NonFinite = "error") -> tuple[Volume, Volume | None]:
    """Read a case with its labels as they are stored.

    Raises:
        DataError: a file is unusable, or the grids differ.
    """
    image = load_image(case, nonfinite=nonfinite)
    if case.label is None:
        return image, None
    if case.arrays is not None:
        return image, read_array_labels(case.arrays, like=image)
    return image, read_labels(case.label, like=image, frame=case.frame)


def load_image(case: Case, *, nonfinite: NonFinite = "error") -> Volume:
    """Read the image of a case.

    Raises:
        DataError: a file is unusable.
    """
    if case.arrays is not None:
        return read_array_image(case.arrays, nonfinite=nonfinite)
    return read_image(case.image, nonfinite=nonfinite, frame=case.frame)


def image_size(case: Case) -> StoredSize:
    """Return how large the image of a case is, without reading its voxels.

    Raises:
        DataError: a file is unusable, as far as its header tells.
    """
    return stored_size(case.image) if case.arrays is None else array_size(case.arrays)


def map_labels(cohort: Cohort, raw: Volume) -> Volume:
    """Turn stored label values into uint8 classes.

    Raises:
        DataError: a value has no class (the message counts the values and suggests targets), or the largest one tells
            that the values are numbered in another way than the cohort says.
    """
    if cohort.label_map is None:
        classes = (raw.voxels > 0).astype(np.uint8)
    else:
        _refuse_other_numbering(cohort, raw)
        classes = np.zeros(raw.voxels.shape, np.uint8)
        for value, index in cohort.label_map.items():
            classes[raw.voxels == value] = index
        if not cohort.others_are_background:
            _refuse_unknown_values(cohort.label_map, raw)
    return replace(raw, voxels=classes)


def _refuse_other_numbering(cohort: Cohort, raw: Volume) -> None:
    if cohort.largest_label is None:
        return
    low, high = cohort.largest_label
    largest = int(raw.voxels.max())
    if not low <= largest <= high:
        want = f"a largest label of {low} to {high}"
        hint = "the labels are numbered in another way: pass the label_space that they were written in"
        raise DataError(raw.path, "labels", got=f"largest label {largest}", want=want, hint=hint)


def _refuse_unknown_values(label_map: Mapping[int, int], raw: Volume) -> None:
    """Refuse values that have no class where no targets were named."""
    values, counts = np.unique(raw.voxels, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    if set(found) <= set(label_map):
        return
    targets = " ".join(f"--target class{value}={value}" for value in found if value > 0)
    known = sorted(label_map)
    raise DataError(
        raw.path,
        "labels",
        got="; ".join(f"value {value} in {count(voxels, 'voxel')}" for value, voxels in found.items()),
        want=f"{listed(known[:-1])} and {known[-1]}",
        hint=f"name the values that you want to segment: {targets}" if targets else "",
    )
