"""One NIfTI file, one volume: read with suspicion, written back on the grid it came from.

Reading trusts nothing. The bytes decide what a file is, not its name. The header's arithmetic is checked before memory
is asked for, a gzip stream is read to its very end (only there its checksum stands, so a damaged voxel cannot slip
through) and never beyond the size that the header promises.

Inside, a volume is a (D, H, W) array: the slice axis first (the axis with the coarsest spacing), then rows and columns
as a radiologist sees them (axial: row 0 anterior, column 0 the patient's right). Only axes are swapped and flipped,
nothing is resampled, so that writing restores the native grid exactly: affine, codes, units and ``pixdim`` come out
as they came in. Free text of the header (descriptions, names) is not carried over.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError

from trifuse.architectures.files import atomic_write, describe_content
from trifuse.kernels.errors import DataError

NonFinite = Literal["error", "zero", "median"]

SUFFIXES = (".nii.gz", ".nii")
GRID_TOLERANCE_VOX = 0.01
"""Two grids are the same if no corner lies further apart than this, in voxels of the finest axis ..."""
GRID_LIMIT_VOX = 0.5
"""... and are taken for the same, with a note, up to this."""
ROUNDING_TOLERANCE = 1e-3
"""Labels stored as floats or with a slope are rounded to integers if they are this close to them."""

_NIFTI1_BYTES, _NIFTI2_BYTES = 348, 540
_DEFLATE_MAX_RATIO = 1032  # zlib's own technical notes: no stream inflates further
_SLACK_BYTES = 1 << 20  # padding that some writers leave behind the last voxel
_CHUNK_BYTES = 1 << 20
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micrometre
_PLAUSIBLE_SPACING_MM = (0.01, 100.0)
_READABLE = {2: "u1", 256: "i1", 512: "u2", 4: "i2", 768: "u4", 8: "i4", 1280: "u8", 1024: "i8", 16: "f4", 64: "f8"}
_WRITABLE = tuple(np.dtype(name) for name in ["u1", "i2", "u2", "i4", "f4"])
_LABEL_TYPES = tuple(np.dtype(name) for name in ["u1", "i2", "u2", "i4"])
_GEOMETRY_FIELDS = (
    *("pixdim", "dim_info", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)

# For each world axis that the slices may follow: the world axes (0 R, 1 A, 2 S) of slices, rows and columns, and which
# way they run. Rows and columns run to the left, the back and the feet, as on a radiologist's screen.
_DISPLAY = {
    2: ((2, +1), (1, -1), (0, -1)),  # axial
    1: ((1, -1), (2, -1), (0, -1)),  # coronal
    0: ((0, -1), (2, -1), (1, -1)),  # sagittal
}


@dataclass(frozen=True)
class Note:
    """Something odd about a file that does not make it unusable: which field, and a sentence."""

    field: str
    text: str


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where a volume lies, and how its native axes are shown.

    Attributes:
        shape: native shape, in the file's axis order.
        affine: native voxel index to world, (4, 4) float64, right-anterior-superior, in the file's unit.
        axes: the native axis that is shown as slices, rows and columns.
        flips: whether slices, rows and columns run against their native axis.
        header: the geometry fields of the file's header, and nothing else of it.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    header: Any = field(repr=False)

    def to_display(self, native: np.ndarray) -> np.ndarray:
        """Return the view (D, H, W) of an array in native axis order."""
        shown = native.transpose(self.axes)
        return shown[tuple(slice(None, None, -1 if flip else None) for flip in self.flips)]

    def to_native(self, shown: np.ndarray) -> np.ndarray:
        """Return the view in native axis order of an array (D, H, W); the inverse of ``to_display``."""
        straight = shown[tuple(slice(None, None, -1 if flip else None) for flip in self.flips)]
        return straight.transpose(np.argsort(self.axes))

    @property
    def display_affine(self) -> np.ndarray:
        """The affine of the array (D, H, W) as it is shown."""
        affine = self.affine.copy()
        for column, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            step = self.affine[:3, axis]
            affine[:3, column] = -step if flip else step
            if flip:
                affine[:3, 3] += step * (self.shape[axis] - 1)
        return affine

    @property
    def display_shape(self) -> tuple[int, int, int]:
        """The shape (D, H, W) as it is shown."""
        depth, height, width = (self.shape[axis] for axis in self.axes)
        return depth, height, width


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels of shape (D, H, W) with the spacing of these three axes in millimetres, and the grid they came from."""

    voxels: np.ndarray
    spacing_mm: tuple[float, float, float]
    geometry: Geometry
    path: Path | None = None
    notes: tuple[Note, ...] = ()


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
    native, found = _without_nonfinite(Path(path), native, nonfinite)
    notes += found
    if native.min() == native.max():
        notes += (Note("voxels", f"every voxel has the same value, {native.flat[0]:g}"),)
    return _volume(native, geometry, Path(path), notes)


def read_labels(path: Path, *, like: Volume | None = None, frame: int | None = None) -> Volume:
    """Read a label map as integer voxels of shape (D, H, W), in the smallest integer type that holds them.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        like: the image that the labels belong to. Its grid must be the same, and the labels are shown as it is.
        frame: which frame of a 4-D file, counted from 0.

    Raises:
        DataError: as for ``read_image``; a value is further than 1e-3 from an integer; or the grid is not that of
            ``like`` (other shape, or corners more than half a voxel away).
    """
    path = Path(path)
    native, geometry, notes = _read(path, frame)
    if native.dtype.kind == "f":
        native, _ = _without_nonfinite(path, native, "error")
        rounded = np.rint(native)
        worst = np.unravel_index(int(np.argmax(np.abs(native - rounded))), native.shape)
        if abs(native[worst] - rounded[worst]) > ROUNDING_TOLERANCE:
            raise DataError(
                path,
                "labels",
                got=f"{native[worst]:g} at voxel {tuple(int(i) for i in worst)}",
                want=f"integers (within {ROUNDING_TOLERANCE:g})",
                hint="is this the image, or a probability map?",
            )
        native = rounded
    low, high = int(native.min()), int(native.max())
    native = native.astype(_label_type(path, low, high))
    if like is not None:
        geometry, found = _match_grids(path, geometry, like)
        notes += found
    return _volume(native, geometry, path, notes)


def write_labels(path: Path, labels: np.ndarray, like: Volume) -> None:
    """Write labels of shape (D, H, W) on the native grid of ``like``, in the smallest safe integer type.

    The file appears whole or not at all, and is read back and compared before it takes its name.

    Raises:
        DataError: the shape is not that of ``like``, or the labels are no integers.
    """
    labels = _of_shape(path, labels, like)
    if labels.dtype.kind not in "bui":
        raise DataError(path, "labels", got=f"values of type {labels.dtype}", want="integers or booleans")
    dtype = _label_type(path, int(labels.min()), int(labels.max()))
    _write(Path(path), labels.astype(dtype), like.geometry)


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
    _write(Path(path), voxels, like.geometry)


def new_volume(native: np.ndarray, affine: np.ndarray) -> Volume:
    """Place an array in native axis order (i, j, k) on a grid of its own.

    Args:
        native: three-dimensional array.
        affine: voxel index to right-anterior-superior world coordinates in mm, (4, 4).

    Raises:
        DataError: the affine is singular or not finite.
    """
    path = Path("new volume")
    _axis_lengths(path, "affine", np.asarray(affine))
    header = nib.Nifti1Header()
    header.set_data_shape(native.shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    geometry, notes = _geometry(path, header, native.shape)
    return _volume(native, geometry, None, notes)


def grid_distance_vox(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """Return how far apart two affines put the corners of a grid, at most, in voxels of the finest axis."""
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    finest = np.linalg.norm(first[:3, :3], axis=0).min()
    return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max() / finest)


def _volume(native: np.ndarray, geometry: Geometry, path: Path | None, notes: tuple[Note, ...]) -> Volume:
    scale = _MM_PER_UNIT.get(int(geometry.header["xyzt_units"]) % 8, 1.0)
    spacing = np.linalg.norm(geometry.affine[:3, :3], axis=0)[list(geometry.axes)] * scale
    voxels = np.ascontiguousarray(geometry.to_display(native))
    return Volume(voxels, (float(spacing[0]), float(spacing[1]), float(spacing[2])), geometry, path, notes)


# ---------------------------------------------------------------------------------------------- reading


def _read(path: Path, frame: int | None) -> tuple[np.ndarray, Geometry, tuple[Note, ...]]:
    """Read voxels in native order, three-dimensional, scaled if the header says so."""
    try:
        header, content = _read_content(path)
    except OSError as error:
        raise DataError(path, "file", got=error.strerror or str(error), want="a readable NIfTI file") from error
    except MemoryError as error:
        raise DataError(path, "voxels", got="more than the memory holds", want="a smaller volume") from error
    shape, dtype, offset = _layout(path, header)
    data = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order="F")
    data, notes = _three_dimensional(path, data, frame)
    slope, intercept = _scaling(path, header)
    if (slope, intercept) != (1.0, 0.0):
        data = data.astype(np.float64) * slope + intercept
    geometry, found = _geometry(path, header, data.shape)
    return data, geometry, notes + found


def _read_content(path: Path) -> tuple[Any, bytes | bytearray]:
    """Read the whole file, decompressed, and its header; every byte that a checksum covers has been checked."""
    compressed = path.name.lower().endswith(".gz")
    kind, want = describe_content(path), "a gzip file" if compressed else "an uncompressed NIfTI file"
    if kind != want:
        raise DataError(path, "content", got=kind, want=f"{want}, by its name")
    content: bytes | bytearray
    if compressed:
        content = _gunzip(path)
        header = _parse_header(path, content[:_NIFTI2_BYTES])
        promised, size = _promised_bytes(path, header), len(content)
    else:
        with open(path, "rb") as stream:
            header = _parse_header(path, stream.read(_NIFTI2_BYTES))
            promised, size = _promised_bytes(path, header), path.stat().st_size
            stream.seek(0)
            content = stream.read(min(promised, size))
    if size < promised:
        raise DataError(path, "voxels", got=f"{size} bytes", want=f"{promised} bytes, by its header")
    return header, content


def _gunzip(path: Path) -> bytearray:
    """Decompress a gzip file to its end, checksum included, but never beyond what its header promises."""
    content, limit = bytearray(), None
    try:
        for piece in _inflated(path):
            content += piece
            if limit is None and len(content) >= _NIFTI2_BYTES:
                limit = _plausible_bytes(path, content) + _SLACK_BYTES
            if limit is not None and len(content) > limit:
                hint = "it inflates to more than the image it claims to hold, and was not read further"
                raise DataError(path, "gzip stream", got=f"more than {limit} bytes", want="what it promises", hint=hint)
    except zlib.error as error:
        hint = "it was damaged while being stored or copied: fetch it again"
        raise DataError(
            path, "gzip stream", got=f"{error}, in byte {len(content)}", want="no damage", hint=hint
        ) from error
    except EOFError as error:
        got = f"an end after {len(content)} decompressed bytes"
        hint = "it is truncated: fetch it again"
        raise DataError(path, "gzip stream", got=got, want="a complete file", hint=hint) from error
    return content


def _inflated(path: Path) -> Iterator[bytes]:
    """Yield the content of a gzip file piece by piece; zlib checks every member, EOFError says that one is cut off."""
    decoder, pending = zlib.decompressobj(wbits=31), b""
    with open(path, "rb") as stream:
        while chunk := pending or stream.read(_CHUNK_BYTES):
            if decoder.eof:  # behind a complete member: zero padding, or one more member
                chunk = chunk.lstrip(b"\0")
                if chunk:
                    decoder = zlib.decompressobj(wbits=31)
            if chunk:
                yield decoder.decompress(chunk, _CHUNK_BYTES)
                chunk = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            pending = chunk
    if not decoder.eof:
        raise EOFError


def _plausible_bytes(path: Path, content: bytearray) -> int:
    """Return the size that the header promises, unless the file is too short to inflate to it."""
    promised, size = _promised_bytes(path, _parse_header(path, content[:_NIFTI2_BYTES])), path.stat().st_size
    if promised > size * _DEFLATE_MAX_RATIO:
        got = f"{size} bytes, too few to hold that however well compressed"
        raise DataError(path, "dim", got=got, want=f"{promised} bytes, by its header")
    return promised


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


def _promised_bytes(path: Path, header: Any) -> int:
    shape, dtype, offset = _layout(path, header)
    return offset + math.prod(shape) * dtype.itemsize


def _layout(path: Path, header: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Check dimensions, type and offset against each other, in Python integers, and return them."""
    count = int(header["dim"][0])
    if not 1 <= count <= 7:
        raise DataError(path, "dim[0]", got=count, want="1 to 7 dimensions")
    shape = tuple(int(length) for length in header["dim"][1 : count + 1])
    shape += (1,) * (3 - count)
    if min(shape) < 1:
        raise DataError(path, "dim", got=shape, want="at least one voxel along every axis")
    code = int(header["datatype"])
    if code in (128, 2304):
        raise DataError(
            path,
            "datatype",
            got=f"an RGB NIfTI (code {code})",
            want="one number per voxel",
            hint="convert it to a grey-scale image first",
        )
    if code not in _READABLE:
        raise DataError(path, "datatype", got=f"code {code}", want="8 to 64 bit integers, or 32 or 64 bit floats")
    dtype = np.dtype(header.endianness + _READABLE[code])
    smallest = 544 if isinstance(header, nib.Nifti2Header) else 352
    offset = float(header["vox_offset"]) or smallest
    if not (smallest <= offset < 2**62):
        raise DataError(path, "vox_offset", got=offset, want=f"at least {smallest}")
    return shape, dtype, int(offset)


def _three_dimensional(path: Path, data: np.ndarray, frame: int | None) -> tuple[np.ndarray, tuple[Note, ...]]:
    """Choose a frame, or drop axes of length 1 behind the third."""
    frames = math.prod(data.shape[3:])
    if frame is not None:
        if data.ndim < 4 or max(data.shape[3:]) != frames or not 0 <= frame < frames:
            raise DataError(path, "frame", got=frame, want=f"0 to {frames - 1} for a file of shape {data.shape}")
        return data.reshape(*data.shape[:3], frames, order="F")[..., frame], ()
    if frames > 1:
        raise DataError(
            path,
            "dim",
            got=f"shape {data.shape}",
            want="a 3-D volume",
            hint=f"choose one of its {frames} frames with frame=0 to frame={frames - 1}",
        )
    if data.ndim == 3:
        return data, ()
    return data.reshape(data.shape[:3], order="F"), (Note("dim", f"shape {data.shape}: axes of length 1 dropped"),)


def _scaling(path: Path, header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):  # the format's way of saying "not scaled"
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise DataError(path, "scl_slope and scl_inter", got=f"{slope} and {intercept}", want="finite numbers")
    return slope, intercept


def _without_nonfinite(path: Path, native: np.ndarray, policy: NonFinite) -> tuple[np.ndarray, tuple[Note, ...]]:
    """Refuse or replace NaN and infinite voxels."""
    if policy not in get_args(NonFinite):
        raise ValueError(f"nonfinite: expected one of {', '.join(get_args(NonFinite))}, got {policy!r}")
    finite = np.isfinite(native)
    if finite.all():
        return native, ()
    first = tuple(int(index) for index in np.unravel_index(int(np.argmin(finite)), finite.shape))
    count = finite.size - int(finite.sum())
    found = f"{count} NaN or infinite voxels ({count / native.size:.3%}), the first at voxel {first}"
    if policy == "error" or not finite.any():
        hint = 'images with few of them can be read with nonfinite="zero" or nonfinite="median"'
        raise DataError(path, "voxels", got=found, want="finite numbers", hint=hint)
    fill = 0.0 if policy == "zero" else float(np.median(native[finite]))
    return np.where(finite, native, native.dtype.type(fill)), (Note("voxels", f"{found}, replaced by {fill:g}"),)


# --------------------------------------------------------------------------------------------- geometry


def _geometry(path: Path, header: Any, shape: tuple[int, ...]) -> tuple[Geometry, tuple[Note, ...]]:
    """Read where the volume lies, and choose how to show it."""
    pixdim = np.array(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise DataError(path, "pixdim", got=pixdim.tolist(), want="three positive numbers")
    name = "sform" if header["sform_code"] > 0 else "qform" if header["qform_code"] > 0 else "pixdim"
    try:
        affine = np.array(header.get_best_affine(), np.float64)
    except (ValueError, HeaderDataError) as error:
        raise DataError(path, name, got=str(error), want="a valid rotation") from error
    lengths = _axis_lengths(path, f"affine ({name})", affine)
    axes, flips = _display_axes(affine, shape)
    kept = type(header)()
    for key in _GEOMETRY_FIELDS:
        kept[key] = header[key]
    geometry = Geometry((shape[0], shape[1], shape[2]), affine, axes, flips, kept)
    return geometry, _geometry_notes(header, name, affine, lengths, shape)


def _axis_lengths(path: Path, name: str, affine: np.ndarray) -> np.ndarray:
    """Return the lengths of a voxel's edges, or raise if they do not span a space."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-4 * lengths.prod()):
        got = np.round(affine, 4).tolist()
        raise DataError(path, name, got=got, want="three independent axes, all finite")
    return lengths


def _display_axes(affine: np.ndarray, shape: Sequence[int]) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Choose slices, rows and columns: the slice axis has one voxel, or the coarsest spacing, or is the most axial."""
    orientation = io_orientation(affine)
    world, sign = orientation[:, 0].astype(int), orientation[:, 1]
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    single = [axis for axis in range(3) if shape[axis] == 1]
    coarsest = [axis for axis in range(3) if lengths[axis] >= 0.99 * lengths.max()]
    slice_axis = single[0] if len(single) == 1 else max(coarsest, key=lambda axis: world[axis])
    wanted = _DISPLAY[int(world[slice_axis])]
    axes = [int(np.flatnonzero(world == axis)[0]) for axis, _ in wanted]
    flips = [bool(sign[axis] != way) for axis, (_, way) in zip(axes, wanted, strict=True)]
    return (axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2])


def _geometry_notes(
    header: Any, name: str, affine: np.ndarray, lengths: np.ndarray, shape: Sequence[int]
) -> tuple[Note, ...]:
    """Say what is odd about the geometry."""
    notes = []
    if name == "pixdim":
        notes.append(Note("orientation", "neither sform nor qform is set: orientation unknown, built from pixdim"))
    if header["sform_code"] > 0 and header["qform_code"] > 0:
        try:
            other = header.get_qform()
        except (ValueError, HeaderDataError):
            other = np.full((4, 4), np.nan)
        distance = grid_distance_vox(affine, other, shape)
        if not distance <= 0.1:
            both = f"qform {np.round(other, 3).tolist()}, sform {np.round(affine, 3).tolist()}"
            notes.append(Note("qform", f"qform and sform are {distance:.3g} voxels apart, the sform counts: {both}"))
    pixdim = np.array(header["pixdim"][1:4], np.float64)
    if not np.allclose(pixdim, lengths, rtol=0.01):
        notes.append(Note("pixdim", f"pixdim says {pixdim.tolist()}, the {name} {lengths.tolist()}: the {name} counts"))
    unit = int(header["xyzt_units"]) % 8
    spacing = lengths * _MM_PER_UNIT.get(unit, 1.0)
    if unit not in _MM_PER_UNIT or unit in (1, 3):
        meaning = {1: "metres", 3: "micrometres"}.get(unit, f"an unknown code, {unit}, taken for millimetres")
        notes.append(Note("spacing", f"the unit of length is {meaning}: spacing {spacing.tolist()} mm"))
    elif unit == 0:
        notes.append(Note("units", "the header names no unit of length: millimetres assumed"))
    low, high = _PLAUSIBLE_SPACING_MM
    if spacing.min() < low or spacing.max() > high:
        notes.append(Note("spacing", f"spacing {spacing.tolist()} mm lies outside {low} to {high} mm: wrong unit?"))
    return tuple(notes)


def _match_grids(path: Path, geometry: Geometry, like: Volume) -> tuple[Geometry, tuple[Note, ...]]:
    """Return the geometry that shows ``path`` as ``like`` is shown, or raise if the two do not share one grid."""
    image = like.geometry
    if (
        geometry.shape == image.shape
        and grid_distance_vox(image.affine, geometry.affine, image.shape) <= GRID_LIMIT_VOX
    ):
        geometry = Geometry(geometry.shape, geometry.affine, image.axes, image.flips, geometry.header)
    if geometry.display_shape != image.display_shape:
        raise DataError(
            path,
            "shape",
            got=f"{geometry.display_shape} (slices, rows, columns)",
            want=f"{image.display_shape}, as {like.path}",
            hint="the labels belong to another image, or were resampled",
        )
    distance = grid_distance_vox(image.display_affine, geometry.display_affine, image.display_shape)
    if distance > GRID_LIMIT_VOX:
        raise DataError(
            path,
            "affine",
            got=f"corners {distance:.3g} voxels away from those of {like.path}",
            want=f"at most {GRID_LIMIT_VOX} voxels",
            hint="the labels belong to another image, or their header was lost",
        )
    if distance > GRID_TOLERANCE_VOX:
        text = f"corners {distance:.3g} voxels away from those of the image: taken for the same grid"
        return geometry, (Note("affine", text),)
    return geometry, ()


# ---------------------------------------------------------------------------------------------- writing


def _of_shape(path: Path, shown: np.ndarray, like: Volume) -> np.ndarray:
    shown, want = np.asarray(shown), like.geometry.display_shape
    if shown.shape != want:
        raise DataError(path, "shape", got=shown.shape, want=f"{want} (slices, rows, columns), as {like.path}")
    return shown


def _label_type(path: Path, low: int, high: int) -> np.dtype:
    for dtype in _LABEL_TYPES:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise DataError(path, "labels", got=f"values from {low} to {high}", want="values that 32 bits hold")


def _write(path: Path, shown: np.ndarray, geometry: Geometry) -> None:
    """Write atomically, and read back before the file takes its name."""
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(path, "name", got=path.name, want=f"a name that ends in {' or '.join(SUFFIXES)}")
    native = geometry.to_native(shown)
    header = type(geometry.header)()
    header.set_data_shape(native.shape)
    header.set_data_dtype(native.dtype)
    for key in _GEOMETRY_FIELDS:
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

    with atomic_write(path, verify=verify) as stream:
        stream.write(payload)
