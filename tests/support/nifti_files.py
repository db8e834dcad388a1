"""NIfTI files for tests: sound ones, and ones with a header that is put in by force."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest

from trifuse.architectures.data.volumes.nifti import read_image
from trifuse.kernels.errors import DataError

SHAPE = (7, 6, 5)
SPACING = np.diag([1.0, 1.5, 4.0, 1.0])
GEOMETRY = (
    *("pixdim", "dim_info", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def save(path, array=None, affine=SPACING, code=1, unit="mm", **fields):
    """Write a file with nibabel, then put ``fields`` into its header by force."""
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) if array is None else array
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    image.header.set_xyzt_units(unit)
    block = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(block[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    block[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(block)) if path.name.endswith(".gz") else bytes(block))
    return path


def refused(path, *words, read=read_image, **options):
    """Assert that reading fails with a message that names the file and every word."""
    with pytest.raises(DataError) as caught:
        read(path, **options)
    for word in (str(path), *words):
        assert word in str(caught.value), str(caught.value)


def outcome(path):
    """Return the error of reading a file, or None."""
    try:
        read_image(path)
    except DataError as error:
        return error
    return None
