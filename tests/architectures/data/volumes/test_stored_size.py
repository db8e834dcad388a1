"""How large an image is, told before a voxel is read: as it turns out to be."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from trifuse.architectures.data.layouts.cohort import Case
from trifuse.architectures.data.layouts.read_case import image_size, load_image
from trifuse.architectures.data.volumes.files import Arrays
from trifuse.architectures.data.volumes.nifti import stored_size
from trifuse.kernels import DataError


def nifti(path: Path, slope: float = 1.0) -> Case:
    voxels = np.arange(5 * 7 * 3, dtype=np.int16).reshape(5, 7, 3)
    image = nib.Nifti1Image(voxels, np.diag([-0.5, 0.75, 4.0, 1.0]))
    image.header.set_slope_inter(slope, 0)
    nib.save(image, path)
    return Case("a", "a", path, None)


def arrays(path: Path, sliced: bool = False) -> Case:
    voxels = np.arange(3 * 5 * 7, dtype=np.float32).reshape(3, 5, 7)
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["image"] = voxels
    elif not sliced:
        np.savez_compressed(path, image=voxels)
    files = (path,)
    if sliced:
        files = tuple(path.with_name(f"slice_{number}.npz") for number in range(3))
        for file, plane in zip(files, voxels, strict=True):
            np.savez(file, image=plane)
    return Case("a", "a", files[0], None, arrays=Arrays(files, sliced=sliced))


@pytest.mark.parametrize(
    ("make", "name", "options", "stored_bytes"),
    [
        (nifti, "a.nii", {}, 352 + 210),
        (nifti, "a.nii.gz", {"slope": 0.5}, 352 + 210),
        (arrays, "a.npz", {}, 420),
        (arrays, "a.h5", {}, 420),
        (arrays, "a.npz", {"sliced": True}, 420),
    ],
)
def test_the_size_is_that_of_the_image(make, name, options, stored_bytes, tmp_path):
    case = make(tmp_path / name, **options)
    size, image = image_size(case), load_image(case)
    assert size.shape == image.voxels.shape
    assert size.spacing_mm == image.spacing_mm
    assert (size.stored_bytes, size.scaled) == (stored_bytes, "slope" in options)


def test_no_voxel_is_read(tmp_path):
    """What follows the header may be damaged, or so large that nobody wants it."""
    case = nifti(tmp_path / "a.nii.gz")
    content = bytearray(gzip.decompress(case.image.read_bytes()))
    content[42:48] = np.array([1000, 1000, 1000], "<i2").tobytes()
    case.image.write_bytes(gzip.compress(bytes(content) + bytes(2_000_000_000 // 1000)) + bytes(3_000_000))
    assert sorted(image_size(case).shape) == [1000, 1000, 1000]
    with pytest.raises(DataError, match=r"gzip stream|voxels"):
        load_image(case)


def test_a_header_that_promises_more_than_the_file_can_hold(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        case = nifti(tmp_path / name)
        raw = case.image.read_bytes()
        content = bytearray(gzip.decompress(raw) if name.endswith("gz") else raw)
        content[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
        case.image.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(DataError, match="54000000000352 bytes, by its header"):
            stored_size(case.image)
    with pytest.raises(DataError, match=r"missing\.nii"):
        stored_size(tmp_path / "missing.nii")
