"""What a NIfTI header says about the bytes behind it, checked before any memory is asked for.

A header is a mapping from the format's field names to numbers, as nibabel parses it; nothing here reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.kernels.errors import DataError

from .geometry import grid_distance_vox
from .volume import Note

GEOMETRY_FIELDS = (
    *("pixdim", "dim_info", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
"""The fields that say where the voxels lie. They are kept as they are, and nothing else of a header is."""

_ROUNDING = 1e-5
"""A quaternion in float32 whose square is longer than 1 by no more than this was rounded, not damaged."""

_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micrometre
_PLAUSIBLE_SPACING_MM = (0.01, 100.0)
_READABLE = {2: "u1", 256: "i1", 512: "u2", 4: "i2", 768: "u4", 8: "i4", 1280: "u8", 1024: "i8", 16: "f4", 64: "f8"}


def promised_bytes(path: Path, header: Any) -> int:
    """Return the size of a whole file, decompressed, by its header; raises as ``layout`` does."""
    shape, dtype, offset = layout(path, header)
    return offset + math.prod(shape) * dtype.itemsize


def layout(path: Path, header: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape (three axes or more), type and offset in bytes of the voxels; sizes are unbounded Python integers.

    Raises:
        DataError: a dimension, the type or the offset cannot be, or is one that is not read.
    """
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
    smallest = header.single_vox_offset
    offset = float(header["vox_offset"]) or smallest
    if not (smallest <= offset < 2**62):
        raise DataError(path, "vox_offset", got=offset, want=f"at least {smallest}")
    return shape, dtype, int(offset)


def scaling(path: Path, header: Any) -> tuple[float, float]:
    """Return slope and intercept from stored to true values, (1, 0) for values stored as they are.

    Raises:
        DataError: one of them is not finite.
    """
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):  # the format's way of saying "not scaled"
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise DataError(path, "scl_slope and scl_inter", got=f"{slope} and {intercept}", want="finite numbers")
    return slope, intercept


def mended(header: Any) -> tuple[Any, tuple[Note, ...]]:
    """Return a copy of a header in which what other programs leave behind is put right, and a note of each mend.

    Only what has one meaning is mended: an sform without a number beside a qform is none; a quaternion that rounding
    made longer than 1 is scaled; an edge without length beside an sform has that of the sform, and the axis that a
    two-dimensional image lacks has length 1.
    """
    header, notes = header.copy(), []
    if header["sform_code"] > 0 and header["qform_code"] > 0 and not _sform_axes(header).any():
        header["sform_code"] = 0
        notes.append(Note("sform", "set, but without a number: the qform counts"))
    if header["qform_code"] > 0 and _mend_quaternion(header):
        notes.append(Note("qform", "the quaternion is longer than 1 by rounding: scaled to 1"))
    if header["dim"][0] == 2 and header["sform_code"] > 0 and not _sform_axes(header)[:, 2].any():
        across = np.cross(*_sform_axes(header)[:, :2].T)
        for name, length in zip(("srow_x", "srow_y", "srow_z"), across / (np.linalg.norm(across) or 1), strict=True):
            header[name][2] = length
        notes.append(Note("sform", "the axis that a 2-D image lacks has no length: 1 taken"))
    sides = np.linalg.norm(_sform_axes(header), axis=0) if header["sform_code"] > 0 else np.zeros(3)
    if header["dim"][0] == 2 and not sides[2]:
        sides[2] = 1
    empty = (header["pixdim"][1:4] == 0) & (sides > 0)
    if empty.any():
        header["pixdim"][1:4][empty] = sides[empty]
        counts = "the sform counts" if header["sform_code"] > 0 else "1 taken for the axis that a 2-D image lacks"
        notes.append(Note("pixdim", f"an edge without length: {counts}"))
    return header, tuple(notes)


def _sform_axes(header: Any) -> np.ndarray:
    return np.array([header[name][:3] for name in ("srow_x", "srow_y", "srow_z")], np.float64)


def _mend_quaternion(header: Any) -> bool:
    """Scale a quaternion that nibabel refuses to length 1 if it is too long by rounding alone; tell whether it was."""
    try:
        header.get_qform_quaternion()
    except ValueError:
        names = ("quatern_b", "quatern_c", "quatern_d")
        length = math.hypot(*(float(header[name]) for name in names))
        if 1 < length * length < 1 + _ROUNDING:
            for name in names:
                header[name] = header[name] / length
            return True
    return False


def mm_per_unit(header: Any) -> float:
    """Return the header's unit of length in mm; millimetres where it names none that is known."""
    return _MM_PER_UNIT.get(int(header["xyzt_units"]) % 8, 1.0)


def geometry_notes(
    header: Any, name: str, affine: np.ndarray, lengths: np.ndarray, shape: Sequence[int], qform: np.ndarray | None
) -> tuple[Note, ...]:
    """Say what is odd about where the header puts the voxels.

    Args:
        header: the header.
        name: the field that counts: sform, qform or pixdim.
        affine: what that field says, (4, 4).
        lengths: of a voxel's edges by the affine, in the header's unit.
        shape: native shape.
        qform: what the qform says if both forms are set (NaN if it is no rotation), else None.
    """
    notes = []
    if name == "pixdim":
        notes.append(Note("orientation", "neither sform nor qform is set: orientation unknown, built from pixdim"))
    if qform is not None:
        distance = grid_distance_vox(affine, qform, shape)
        if not distance <= 0.1:
            both = f"qform {np.round(qform, 3).tolist()}, sform {np.round(affine, 3).tolist()}"
            notes.append(Note("qform", f"qform and sform are {distance:.3g} voxels apart, the sform counts: {both}"))
    pixdim = np.array(header["pixdim"][1:4], np.float64)
    if not np.allclose(pixdim, lengths, rtol=0.01):
        notes.append(Note("pixdim", f"pixdim says {pixdim.tolist()}, the {name} {lengths.tolist()}: the {name} counts"))
    unit = int(header["xyzt_units"]) % 8
    spacing = lengths * mm_per_unit(header)
    if unit not in _MM_PER_UNIT or unit in (1, 3):
        meaning = {1: "metres", 3: "micrometres"}.get(unit, f"an unknown code, {unit}, taken for millimetres")
        notes.append(Note("spacing", f"the unit of length is {meaning}: spacing {spacing.tolist()} mm"))
    elif unit == 0:
        notes.append(Note("units", "the header names no unit of length: millimetres assumed"))
    low, high = _PLAUSIBLE_SPACING_MM
    if spacing.min() < low or spacing.max() > high:
        notes.append(Note("spacing", f"spacing {spacing.tolist()} mm lies outside {low} to {high} mm: wrong unit?"))
    return tuple(notes)
