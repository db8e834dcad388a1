"""Volumes that lie as bare arrays in NumPy (``.npz``) or HDF5 (``.h5``) files, as published packages ship them.

Such files know no grid and no spacing: their volumes get 1 x 1 x 1 voxels and are shown as they are stored. Nothing in
them is executed: pickled objects and links to other files are refused.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.architectures.storage.atomic_files import damage_advice, describe_content
from trifuse.architectures.storage.numpy_file import NUMBERS, Limit, open_npz
from trifuse.architectures.storage.survival import fatality
from trifuse.kernels.errors import DataError, MissingExtra

from .files import Arrays, NonFinite
from .nifti import unplaced_volume
from .volume import Note, StoredSize, Volume
from .voxel_values import rounded_labels, smallest_label_type, without_nonfinite

_LARGEST_VALUE_BYTES = 8
_CHECKSUM_BYTES = 4  # that a piece may have beside its values


def read_array_image(arrays: Arrays, *, nonfinite: NonFinite = "error") -> Volume:
    """Read an image as float32 voxels of shape (D, H, W), without a grid of its own.

    Raises:
        DataError: a file is missing, damaged or of another kind, or its array is no usable image.
        MissingExtra: h5py is not installed.
    """
    path = arrays.files[0]
    voxels = _read_stack(arrays, arrays.image_key, None)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
        voxels = voxels.astype(np.float32)
    voxels, notes = without_nonfinite(path, voxels, nonfinite)
    if voxels.min() == voxels.max():
        notes += (Note("voxels", f"every voxel has the same value, {voxels.flat[0]:g}"),)
    return replace(unplaced_volume(voxels, path), notes=notes)


def array_size(arrays: Arrays) -> StoredSize:
    """Return how large an image is, without reading its values.

    Raises:
        DataError: a file is missing, damaged or of another kind, or lacks the array.
        MissingExtra: h5py is not installed.
    """
    path, key = arrays.files[0], arrays.image_key
    if _kind_of(path) == "a zip file":
        with open_npz(path) as archive:
            shape, dtype = archive.described(key)
    else:
        _require_survivable(path, key, partial(_described_h5, path, key))
        with _named_errors(path, key):
            shape, dtype = _described_h5(path, key)
    shape = (len(arrays.files), *shape) if arrays.sliced else shape
    if len(shape) != 3:
        raise DataError(path, key, got=f"shape {shape}", want="(slices, rows, columns)")
    return StoredSize((shape[0], shape[1], shape[2]), (1.0, 1.0, 1.0), math.prod(shape) * dtype.itemsize)


def read_array_labels(arrays: Arrays, *, like: Volume) -> Volume:
    """Read a label map of the image ``like``, in the smallest integer type that holds its values.

    Raises:
        DataError: a file is unusable, a value is no integer, or the shape is not that of the image.
        MissingExtra: h5py is not installed.
    """
    path = arrays.files[0]
    voxels = _read_stack(arrays, arrays.label_key, like.voxels.size)
    if voxels.dtype.kind == "f":
        voxels = rounded_labels(path, voxels)
    voxels = voxels.astype(smallest_label_type(path, int(voxels.min()), int(voxels.max())))
    if voxels.shape != like.voxels.shape:
        raise DataError(path, arrays.label_key, got=f"shape {voxels.shape}", want=f"{like.voxels.shape}, as the image")
    return replace(like, voxels=voxels, notes=())


def _read_stack(arrays: Arrays, key: str, voxels: int | None) -> np.ndarray:
    """Read an array of all files as (D, H, W); of so many voxels at most, if that is known."""
    dimensions = 2 if arrays.sliced else 3
    parts: list[np.ndarray] = []
    for path in arrays.files:
        part = _read_array(path, key, dimensions, voxels)
        if parts and part.shape != parts[0].shape:
            raise DataError(
                path, key, got=f"shape {part.shape}", want=f"{parts[0].shape}, as in {arrays.files[0].name}"
            )
        parts.append(part)
    return np.stack(parts) if arrays.sliced else parts[0]


def _read_array(path: Path, key: str, dimensions: int, voxels: int | None) -> np.ndarray:
    kind, limit = _kind_of(path), Limit.of_file(path)
    if voxels is not None:
        limit = min(limit, Limit(_LARGEST_VALUE_BYTES * voxels, "as its image has no more voxels"))
    if kind == "a zip file":
        with open_npz(path) as archive:
            array = archive.read(key, limit)
    else:
        _require_survivable(path, key, partial(_from_h5, path, key, limit))
        with _named_errors(path, key):
            array = _from_h5(path, key, limit)
    if array.ndim != dimensions or 0 in array.shape:
        want = "(slices, rows, columns)" if dimensions == 3 else "(rows, columns)"
        raise DataError(path, key, got=f"shape {array.shape}", want=f"{want}, at least one voxel along each")
    return array


def _kind_of(path: Path) -> str:
    want = "a zip file" if path.suffix == ".npz" else "an HDF5 file"
    try:
        kind = describe_content(path)
    except OSError as error:
        raise DataError(path, "file", got=error.strerror, want="a readable file") from error
    if kind != want:
        raise DataError(path, "content", got=kind, want=f"{want}, by its name")
    return kind


@contextmanager
def _named_errors(path: Path, key: str) -> Iterator[None]:
    """Say which file and array it was that a library could not read."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(path, key, got="more than the memory holds", want="a smaller volume") from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:  # a TypeError for a type NumPy lacks
        raise DataError(
            path, key, got=str(error) or repr(error), want="an intact array", hint=damage_advice(error)
        ) from error


def _require_survivable(path: Path, key: str, read: Callable[[], object]) -> None:
    """Read an HDF5 file in a process that may die of it: damage makes its library crash, and this process with it."""
    if end := fatality(read):
        got = f"a file that ends its reader with {end}"
        raise DataError(path, key, got=got, want="an intact HDF5 file", hint="fetch it again")


def _described_h5(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    with _h5_array(path, key) as dataset:
        return dataset.shape, dataset.dtype


def _from_h5(path: Path, key: str, limit: Limit) -> np.ndarray:
    with _h5_array(path, key) as dataset:
        limit.check(path, key, dataset.shape, dataset.dtype)
        _refuse_inflating(path, key, dataset)
        return np.asarray(dataset[()])


@contextmanager
def _h5_array(path: Path, key: str) -> Iterator[Any]:
    """Open an HDF5 file's own array of numbers."""
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise MissingExtra("h5py", "h5", f"reading {path.name}") from error
    with h5py.File(path, "r") as file:
        if key not in file:
            got = f"arrays {', '.join(sorted(file)) or 'none'}"
            raise DataError(path, key, got=got, want=f"an array named {key!r}")
        if not isinstance(file.get(key, getlink=True), h5py.HardLink):
            raise DataError(path, key, got="a link", want="an array in the file itself")
        dataset = file[key]
        if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
            raise DataError(path, key, got="a group, or numbers in another file", want="an array in the file itself")
        if dataset.dtype.kind not in NUMBERS or dataset.shape is None:
            got = "no values at all" if dataset.shape is None else f"values of type {dataset.dtype}"
            raise DataError(path, key, got=got, want="numbers")
        yield dataset


def _refuse_inflating(path: Path, key: str, dataset: Any) -> None:
    """Refuse a compressed piece that holds more than it says: HDF5 inflates it whole before it looks."""
    if dataset.compression != "gzip":
        return
    most = math.prod(dataset.chunks) * dataset.dtype.itemsize + _CHECKSUM_BYTES
    for index in range(dataset.id.get_num_chunks()):
        _, stored = dataset.id.read_direct_chunk(dataset.id.get_chunk_info(index).chunk_offset)
        with suppress(zlib.error):  # not compressed, or damaged, which HDF5 itself says
            if len(zlib.decompressobj().decompress(stored, most + 1)) > most:
                got = "a piece that inflates to more than its size"
                raise DataError(path, key, got=got, want=f"{most} bytes at most", hint="fetch it again")
