"""Volumes that lie as bare arrays in NumPy (``.npz``) or HDF5 (``.h5``) files, as published packages ship them.

Such files know no grid and no spacing: their volumes get 1 x 1 x 1 voxels and are shown as they are stored. Nothing in
them is executed: pickled objects and links to other files are refused.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np

from trifuse.architectures.storage.atomic_files import describe_content
from trifuse.kernels.errors import DataError, MissingExtra

from .files import Arrays, NonFinite
from .nifti import unplaced_volume
from .volume import Note, Volume
from .voxel_values import rounded_labels, smallest_label_type, without_nonfinite

_MOST_COMPRESSED = 1100
"""No file in these formats holds more than so many bytes per byte on disk: deflate's limit is 1032."""


def read_array_image(arrays: Arrays, *, nonfinite: NonFinite = "error") -> Volume:
    """Read an image as float32 voxels of shape (D, H, W), without a grid of its own.

    Raises:
        DataError: a file is missing, damaged or of another kind, or its array is no usable image.
        MissingExtra: h5py is not installed.
    """
    path = arrays.files[0]
    voxels = _read_stack(arrays, arrays.image_key)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
        voxels = voxels.astype(np.float32)
    voxels, notes = without_nonfinite(path, voxels, nonfinite)
    if voxels.min() == voxels.max():
        notes += (Note("voxels", f"every voxel has the same value, {voxels.flat[0]:g}"),)
    return replace(unplaced_volume(voxels, path), notes=notes)


def read_array_labels(arrays: Arrays, *, like: Volume) -> Volume:
    """Read a label map of the image ``like``, in the smallest integer type that holds its values.

    Raises:
        DataError: a file is unusable, a value is no integer, or the shape is not that of the image.
        MissingExtra: h5py is not installed.
    """
    path = arrays.files[0]
    voxels = _read_stack(arrays, arrays.label_key)
    if voxels.dtype.kind == "f":
        voxels = rounded_labels(path, voxels)
    voxels = voxels.astype(smallest_label_type(path, int(voxels.min()), int(voxels.max())))
    if voxels.shape != like.voxels.shape:
        raise DataError(path, arrays.label_key, got=f"shape {voxels.shape}", want=f"{like.voxels.shape}, as the image")
    return replace(like, voxels=voxels, notes=())


def _read_stack(arrays: Arrays, key: str) -> np.ndarray:
    """Read an array of all files as (D, H, W)."""
    dimensions = 2 if arrays.sliced else 3
    parts: list[np.ndarray] = []
    for path in arrays.files:
        part = _read_array(path, key, dimensions)
        if parts and part.shape != parts[0].shape:
            raise DataError(
                path, key, got=f"shape {part.shape}", want=f"{parts[0].shape}, as in {arrays.files[0].name}"
            )
        parts.append(part)
    return np.stack(parts) if arrays.sliced else parts[0]


def _read_array(path: Path, key: str, dimensions: int) -> np.ndarray:
    kind = _kind_of(path)
    with _named_errors(path, key):
        array = _from_npz(path, key) if kind == "a zip file" else _from_h5(path, key)
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
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            path, key, got=str(error) or repr(error), want="an intact array", hint="copy it again"
        ) from error


def _from_npz(path: Path, key: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        _require(path, key, [name.removesuffix(".npy") for name in archive.namelist()])
        with archive.open(f"{key}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
        _refuse_unreadable(path, key, dtype, shape)
        with archive.open(f"{key}.npy") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def _from_h5(path: Path, key: str) -> np.ndarray:
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise MissingExtra("h5py", "h5", f"reading {path.name}") from error
    with h5py.File(path, "r") as file:
        _require(path, key, list(file))
        if not isinstance(file.get(key, getlink=True), h5py.HardLink):
            raise DataError(path, key, got="a link", want="an array in the file itself")
        dataset = file[key]
        if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
            raise DataError(path, key, got="a group, or numbers in another file", want="an array in the file itself")
        _refuse_unreadable(path, key, dataset.dtype, dataset.shape)
        return np.asarray(dataset[()])


def _require(path: Path, key: str, names: Sequence[str]) -> None:
    if key not in names:
        raise DataError(path, key, got=f"arrays {', '.join(sorted(names)) or 'none'}", want=f"an array named {key!r}")


def _refuse_unreadable(path: Path, key: str, dtype: np.dtype, shape: Sequence[int]) -> None:
    """Refuse what is no number, and more numbers than a file of this size can hold, before memory is asked for."""
    if dtype.kind not in "buif":
        hint = "objects are pickles, which can execute code: they are never read"
        raise DataError(path, key, got=f"values of type {dtype}", want="numbers", hint=hint)
    limit = _MOST_COMPRESSED * path.stat().st_size
    if dtype.itemsize * math.prod(shape) > limit:
        raise DataError(path, key, got=f"shape {shape}", want=f"at most {limit} bytes, as its file is that small")
