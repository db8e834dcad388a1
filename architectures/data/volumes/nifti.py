"""One NIfTI file, one volume: read with suspicion, written back on the grid it came from.

Reading trusts nothing. The bytes decide what a file is, not its name. The header's arithmetic is checked before memory
is asked for, a gzip stream is read to its very end (only there its checksum stands, so a damaged voxel cannot slip
through) and never beyond the size that the header promises.

Inside, a volume is a (D, H, W) array: the slice axis first (the axis with the coarsest spacing), then rows and columns
as a radiologist sees them (axial: row 0 anterior, column 0 the patient's right). Only axes are swapped and flipped,
nothing is resampled, so that writing restores the native grid exactly: affine, codes, units and ``pixdim`` come out
as they came in, or mended where other programs could not read them, and a 2-D image stays one. Free text of the header
(descriptions, names) is not carried over.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError

from trifuse.architectures.storage.atomic_files import atomic_write, describe_content
from trifuse.kernels.errors import DataError

from .files import NIFTI_SUFFIXES, NonFinite
from .geometry import Geometry, axis_lengths, display_axes
from .gzip_stream import gunzip
from .nifti_header import GEOMETRY_FIELDS, geometry_notes, layout, mended, mm_per_unit, promised_bytes, scaling
from .volume import Note, StoredSize, Volume, match_grids
from .voxel_values import rounded_labels, smallest_label_type, three_dimensional, without_nonfinite

_NIFTI1_BYTES, _NIFTI2_BYTES = 348, 540
_WRITABLE = tuple(np.dtype(name) for name in ["u1", "i2", "u2", "i4", "f4"])


def read_image(path: Path, *, frame: int | None = None, nonfinite: NonFinite = "error") -> Volume:
    """Read an image as float32 voxels of shape (D, H, W).

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        frame: which frame of a 4-D file, counted from 0.
        nonfinite: what to do with NaN and infinite voxels: refuse the file, or put zero or the median of the finite
            voxels in their place (with a note).

    Raises:
        DataError: the file is missing, damaged, no NIfTI file, or holds no usable 3-D image.
    """
    native, geometry, notes = _read(Path(path), frame)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
        native = native.astype(np.float32)
    native, found = without_nonfinite(Path(path), native, nonfinite)
    notes += found
    if native.min() == native.max():
        notes += (Note("voxels", f"every voxel has the same value, {native.flat[0]:g}"),)
    return _volume(native, geometry, Path(path), notes)


def read_labels(path: Path, *, like: Volume | None = None, frame: int | None = None) -> Volume:
    """Read a label map as integer voxels of shape (D, H, W), in the smallest integer type that holds them.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        like: the image that the labels belong to. Its grid must be the same, and the labels are shown as it is.
        frame: which frame of a 4-D file, which has as many as the image's; a 3-D file holds the labels of that frame.

    Raises:
        DataError: as for ``read_image``; a value is further than 1e-3 from an integer; or the grid is not that of
            ``like`` (other shape or frames, or corners more than half a voxel away).
    """
    path = Path(path)
    native, geometry, notes = _read(path, frame, may_be_of_frame=True)
    if native.dtype.kind == "f":
        native = rounded_labels(path, native)
    low, high = int(native.min()), int(native.max())
    native = native.astype(smallest_label_type(path, low, high))
    if like is not None:
        geometry, found = match_grids(path, geometry, like)
        notes += found
    return _volume(native, geometry, path, notes)


def stored_size(path: Path) -> StoredSize:
    """Return how large an image is by its header alone.

    Raises:
        DataError: the file is missing, no NIfTI file, damaged in its header, or too short for what that promises.
    """
    try:
        header, _ = _read_content(Path(path), only_header=True)
    except OSError as error:
        raise DataError(path, "file", got=error.strerror or str(error), want="a readable NIfTI file") from error
    shape, _, _ = layout(path, header)
    geometry, _ = _geometry(path, header, shape[:3])
    scaled = scaling(path, header) != (1.0, 0.0)
    return StoredSize(geometry.display_shape, _spacing_mm(geometry), promised_bytes(path, header), scaled)


def write_labels(
    path: Path, labels: np.ndarray, like: Volume, before: Callable[[Path], object] = lambda temporary: None
) -> None:
    """Write labels of shape (D, H, W) on the native grid of ``like``, in the smallest safe integer type.

    The file appears whole or not at all, and is read back and compared before it takes its name; ``before`` is called
    then, with its temporary name.

    Raises:
        DataError: the shape is not that of ``like``, or the labels are no integers.
    """
    labels = _of_shape(path, labels, like)
    if labels.dtype.kind not in "bui":
        raise DataError(path, "labels", got=f"values of type {labels.dtype}", want="integers or booleans")
    dtype = smallest_label_type(path, int(labels.min()), int(labels.max()))
    _write(Path(path), labels.astype(dtype), like.geometry, before)


def write_image(path: Path, voxels: np.ndarray, like: Volume) -> None:
    """Write voxels of shape (D, H, W) on the native grid of ``like``, in their own type (float64 becomes float32).

    Raises:
        DataError: the shape is not that of ``like``, or NIfTI readers in use would not understand the type.
    """
    voxels = _of_shape(path, voxels, like)
    if voxels.dtype == np.float64:
        voxels = voxels.astype(np.float32)
    if voxels.dtype not in _WRITABLE:
        names = ", ".join(str(dtype) for dtype in _WRITABLE)
        raise DataError(path, "voxels", got=f"type {voxels.dtype}", want=f"one of {names}")
    _write(Path(path), voxels, like.geometry, lambda temporary: None)


def new_volume(native: np.ndarray, affine: np.ndarray) -> Volume:
    """Place an array in native axis order (i, j, k) on a grid of its own.

    Args:
        native: three-dimensional array.
        affine: voxel index to right-anterior-superior world coordinates in mm, (4, 4).

    Raises:
        DataError: the affine is singular or not finite.
    """
    path = Path("new volume")
    axis_lengths(path, "affine", np.asarray(affine))
    header = nib.Nifti1Header()
    header.set_data_shape(native.shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    geometry, notes = _geometry(path, header, native.shape)
    return _volume(native, geometry, None, notes)


def unplaced_volume(shown: np.ndarray, path: Path) -> Volume:
    """Give an array (D, H, W) that knows no grid one to be written on: 1 x 1 x 1 voxels of no unit, shown as it is."""
    header = nib.Nifti1Header()
    header.set_data_shape(shown.shape[::-1])
    native_shape = (shown.shape[2], shown.shape[1], shown.shape[0])
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    geometry = Geometry(native_shape, affine, (2, 1, 0), (False, False, False), header)
    return Volume(shown, (1.0, 1.0, 1.0), geometry, path)


def _volume(native: np.ndarray, geometry: Geometry, path: Path | None, notes: tuple[Note, ...]) -> Volume:
    voxels = np.ascontiguousarray(geometry.to_display(native))
    return Volume(voxels, _spacing_mm(geometry), geometry, path, notes)


def _spacing_mm(geometry: Geometry) -> tuple[float, float, float]:
    """Return the spacing of the axes as they are shown."""
    spacing = np.linalg.norm(geometry.affine[:3, :3], axis=0)[list(geometry.axes)] * mm_per_unit(geometry.header)
    return float(spacing[0]), float(spacing[1]), float(spacing[2])


# ---------------------------------------------------------------------------------------------- reading


def _read(
    path: Path, frame: int | None, *, may_be_of_frame: bool = False
) -> tuple[np.ndarray, Geometry, tuple[Note, ...]]:
    """Read voxels in native order, three-dimensional, scaled if the header says so.

    With ``may_be_of_frame`` a file of one volume may be the frame alone.
    """
    try:
        header, content = _read_content(path)
    except OSError as error:
        raise DataError(path, "file", got=error.strerror or str(error), want="a readable NIfTI file") from error
    except MemoryError as error:
        raise DataError(path, "voxels", got="more than the memory holds", want="a smaller volume") from error
    shape, dtype, offset = layout(path, header)
    data = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order="F")
    is_of_frame = may_be_of_frame and math.prod(shape[3:]) == 1
    data, notes = three_dimensional(path, data, None if is_of_frame else frame)
    slope, intercept = scaling(path, header)
    if (slope, intercept) != (1.0, 0.0):
        data = data.astype(np.float64) * slope + intercept
    geometry, found = _geometry(path, header, data.shape)
    return data, geometry, notes + found


def _read_content(path: Path, *, only_header: bool = False) -> tuple[Any, bytes | bytearray]:
    """Read the whole file, decompressed, and its header; every byte that a checksum covers has been checked.

    With ``only_header`` no voxels are read, and none are checked.
    """
    compressed = path.name.lower().endswith(".gz")
    kind, want = describe_content(path), "a gzip file" if compressed else "an uncompressed NIfTI file"
    if kind != want:
        raise DataError(path, "content", got=kind, want=f"{want}, by its name")
    content: bytes | bytearray
    if compressed:
        content = gunzip(
            path,
            _NIFTI2_BYTES,
            lambda head: promised_bytes(path, _parse_header(path, head)),
            only_header=only_header,
        )
        header = _parse_header(path, content[:_NIFTI2_BYTES])
        promised = promised_bytes(path, header)
        size = promised if only_header else len(content)
    else:
        with open(path, "rb") as stream:
            header = _parse_header(path, stream.read(_NIFTI2_BYTES))
            promised, size = promised_bytes(path, header), path.stat().st_size
            stream.seek(0)
            content = b"" if only_header else stream.read(min(promised, size))
    if size < promised:
        raise DataError(path, "voxels", got=f"{size} bytes", want=f"{promised} bytes, by its header")
    return header, content


def _parse_header(path: Path, block: bytes | bytearray) -> Any:
    """Parse a NIfTI-1 or NIfTI-2 header, of either byte order."""
    block = bytes(block)
    if len(block) >= _NIFTI1_BYTES and block[344:348] == b"n+1\0":
        return nib.Nifti1Header(block[:_NIFTI1_BYTES], check=False)
    if len(block) >= _NIFTI2_BYTES and block[4:8] == b"n+2\0":
        return nib.Nifti2Header(block[:_NIFTI2_BYTES], check=False)
    raise DataError(
        path,
        "magic",
        got=block[344:348] or "nothing",
        want="'n+1' or 'n+2', a single-file NIfTI",
        hint="if it is an .hdr/.img pair or another format, convert it to NIfTI",
    )


# --------------------------------------------------------------------------------------------- geometry


def _geometry(path: Path, header: Any, shape: tuple[int, ...]) -> tuple[Geometry, tuple[Note, ...]]:
    """Read where the volume lies, and choose how to show it."""
    header, mends = mended(header)
    pixdim = np.array(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise DataError(path, "pixdim", got=pixdim.tolist(), want="three positive numbers")
    name = "sform" if header["sform_code"] > 0 else "qform" if header["qform_code"] > 0 else "pixdim"
    try:
        affine = np.array(header.get_best_affine(), np.float64)
    except (ValueError, HeaderDataError) as error:
        raise DataError(path, name, got=str(error), want="a valid rotation") from error
    lengths = axis_lengths(path, f"affine ({name})", affine)
    axes, flips = display_axes(affine, shape, io_orientation(affine))
    kept = type(header)()
    for key in GEOMETRY_FIELDS:
        kept[key] = header[key]
    dimensions = int(header["dim"][0])
    frames = math.prod(int(length) for length in header["dim"][4 : dimensions + 1])
    geometry = Geometry((shape[0], shape[1], shape[2]), affine, axes, flips, kept, min(dimensions, 3), frames)
    qform = _qform(header) if header["sform_code"] > 0 and header["qform_code"] > 0 else None
    return geometry, mends + geometry_notes(header, name, affine, lengths, shape, qform)


def _qform(header: Any) -> np.ndarray:
    """Return the affine that the quaternion stands for, NaN if it is no rotation."""
    try:
        return header.get_qform()
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


# ---------------------------------------------------------------------------------------------- writing


def _of_shape(path: Path, shown: np.ndarray, like: Volume) -> np.ndarray:
    shown, want = np.asarray(shown), like.geometry.display_shape
    if shown.shape != want:
        raise DataError(path, "shape", got=shown.shape, want=f"{want} (slices, rows, columns), as {like.path}")
    return shown


def _write(path: Path, shown: np.ndarray, geometry: Geometry, before: Callable[[Path], object]) -> None:
    """Write atomically, read back, and call ``before``, before the file takes its name."""
    if not path.name.lower().endswith(NIFTI_SUFFIXES):
        raise DataError(path, "name", got=path.name, want=f"a name that ends in {' or '.join(NIFTI_SUFFIXES)}")
    native = geometry.to_native(shown)
    header = type(geometry.header)()
    header.set_data_shape(native.shape[: geometry.dimensions])
    header.set_data_dtype(native.dtype)
    for key in GEOMETRY_FIELDS:
        header[key] = geometry.header[key]
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    payload = header.binaryblock + bytes(4) + native.tobytes(order="F")
    if path.name.lower().endswith(".gz"):
        payload = gzip.compress(payload, compresslevel=6, mtime=0)

    def verify(temporary: Path) -> None:
        try:
            same = np.array_equal(_read(temporary, None)[0], native, equal_nan=True)
        except DataError:
            same = False
        if not same:
            hint = "the disk may be failing; what stood there before is untouched"
            raise DataError(path, "writing", got="other bytes when read back", want="what was written", hint=hint)
        before(temporary)

    with atomic_write(path, verify=verify) as stream:
        stream.write(payload)
