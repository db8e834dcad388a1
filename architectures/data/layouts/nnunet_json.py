"""The ``dataset.json`` of nnU-Net's raw data sets: read with every fault named, all of them at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trifuse.architectures.data.volumes.files import NIFTI_SUFFIXES
from trifuse.architectures.storage.file_names import path_below, real_path
from trifuse.architectures.storage.text import listed, read_parsed, repeated
from trifuse.kernels.errors import DataError

DESCRIPTION_FILE = "dataset.json"
_REQUIRED = ("channel_names", "labels", "numTraining", "file_ending")
_UNUSED = ("overwrite_image_reader_writer", "regions_class_order")
_BACKGROUND, _IGNORE = "background", "ignore"


@dataclass(frozen=True)
class Listed:
    """The files of a case that ``dataset.json`` lists itself: one image per channel, and the labels."""

    images: tuple[Path, ...]
    label: Path


@dataclass
class Description:
    """What a ``dataset.json`` says, as far as it makes sense, and what is wrong with it.

    Attributes:
        path: the file.
        channels: names of the channels, in the order of their numbers; None if they are not told.
        labels: value of each label by its name, values rising; None if something is wrong with them.
        file_ending: of all images and labels, ``".nii.gz"`` where it cannot be used.
        cases: files by case where the file lists them, else None.
        count: ``numTraining``; None if it is no number.
        problems: all faults.
        notes: what is ignored.
    """

    path: Path
    channels: tuple[str, ...] | None = None
    labels: dict[str, int] | None = None
    file_ending: str = ".nii.gz"
    cases: dict[str, Listed] | None = None
    count: int | None = None
    problems: list[DataError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, name: str, got: object, want: object, hint: str = "") -> None:
        """Add a fault of a field."""
        self.problems.append(DataError(self.path, name, got=got, want=want, hint=hint))


def read_description(root: Path) -> Description:
    """Read the ``dataset.json`` of a folder; faults come back in its ``problems``.

    Raises:
        DataError: there is none, or it is no JSON object.
    """
    path = root / DESCRIPTION_FILE
    found = Description(path)
    try:
        values = read_parsed(path, partial(json.loads, object_pairs_hook=lambda pairs: _object(pairs, found)))
    except OSError as error:
        raise DataError(path, "file", got=error.strerror, want="the description of an nnU-Net data set") from error
    except ValueError as error:
        raise DataError(path, "JSON", got=str(error), want="valid JSON") from error
    if not isinstance(values, dict):
        raise DataError(path, "JSON", got=type(values).__name__, want="an object with fields")
    readers: dict[str, Callable[[Description, Any], None]] = {
        "channel_names": _read_channels,
        "labels": _read_labels,
        "numTraining": _read_count,
        "file_ending": _read_ending,
        "dataset": _read_cases,
    }
    for name, reader in readers.items():
        if name in values:
            reader(found, values[name])
        elif name in _REQUIRED:
            hint = (
                "this is nnU-Net 1's name of channel_names" if name == "channel_names" and "modality" in values else ""
            )
            found.refuse(name, "no such field", "one of the required fields", hint)
    found.notes += [f"{DESCRIPTION_FILE}: {name} is ignored" for name in _UNUSED if name in values]
    return found


def _object(pairs: list[tuple[str, Any]], found: Description) -> dict[str, Any]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            found.refuse(name, f"{times} fields of that name", "one")
    return dict(pairs)


def _read_channels(found: Description, value: Any) -> None:
    numbers = [str(number) for number in range(len(value))] if isinstance(value, dict) else []
    if not numbers or sorted(value, key=str) != sorted(numbers):
        found.refuse("channel_names", value, 'names by number, such as {"0": "CT"}')
        return
    found.channels = tuple(str(value[number]) for number in numbers)


def _read_labels(found: Description, value: Any) -> None:
    if not isinstance(value, dict) or not value:
        found.refuse("labels", value, 'values by name, such as {"background": 0, "liver": 1}')
        return
    before = len(found.problems)
    hint = "nnU-Net 1 wrote names by value: turn them round" if all(isinstance(v, str) for v in value.values()) else ""
    for name, number in value.items():
        if isinstance(number, list):
            want = "one value: regions, which overlap, are not supported"
            found.refuse(f"labels: {name}", number, want, "list the labels one by one, and join them with targets")
        elif type(number) is not int:
            found.refuse(f"labels: {name}", number, "an integer", hint)
    labels = {name: number for name, number in value.items() if type(number) is int}
    if _IGNORE in labels:
        found.refuse(f"labels: {_IGNORE}", labels[_IGNORE], "no such label: all voxels have to count")
    if labels.get(_BACKGROUND) != 0:
        found.refuse(f"labels: {_BACKGROUND}", labels.get(_BACKGROUND, "no such label"), 0)
    if len(labels) == len(value) and sorted(labels.values()) != list(range(len(labels))):
        found.refuse("labels", sorted(labels.values()), f"consecutive values, 0 to {len(labels) - 1}, each once")
    if len(found.problems) == before:
        found.labels = dict(sorted(labels.items(), key=lambda pair: pair[1]))


def _read_count(found: Description, value: Any) -> None:
    if type(value) is int:
        found.count = value
    else:
        found.refuse("numTraining", value, "the number of training cases")


def _read_ending(found: Description, value: Any) -> None:
    if value in NIFTI_SUFFIXES:
        found.file_ending = value
    else:
        found.refuse("file_ending", value, " or ".join(NIFTI_SUFFIXES), "convert the files to NIfTI first")


def _read_cases(found: Description, value: Any) -> None:
    if not isinstance(value, dict):
        found.refuse("dataset", value, 'files by case, such as {"case": {"images": [...], "label": ...}}')
        return
    found.cases = {}
    for name, files in value.items():
        images, label = (files.get("images"), files.get("label")) if isinstance(files, dict) else (None, None)
        if not (isinstance(images, list) and images and all(isinstance(path, str) for path in [*images, label])):
            found.refuse(f"dataset: {name}", files, '{"images": [one file per channel], "label": a file}')
            continue
        paths = [inside for path in [*images, str(label)] if (inside := _inside(found, name, path)) is not None]
        if len(paths) == len(images) + 1:
            found.cases[name] = Listed(tuple(paths[:-1]), paths[-1])
    files = [str(path) for listing in found.cases.values() for path in (*listing.images, listing.label)]
    if twice := repeated(files):
        found.refuse("dataset", f"{listed(twice)} more than once", "each file once: an image of one case and channel")


def _inside(found: Description, name: str, path: str) -> Path | None:
    """Return a listed path, if it stays below the data set's folder, links followed."""
    root = found.path.parent
    full = path_below(root, path)
    if full is None or not real_path(full).is_relative_to(real_path(root)):
        found.refuse(f"dataset: {name}", path, "a file below the folder of the data set")
        return None
    return full
