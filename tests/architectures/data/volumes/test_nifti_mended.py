"""Headers as other programs leave them: mended where they have one meaning, said in a note, and written mended."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from nifti_files import SHAPE, SPACING, refused, save

from trifuse.architectures.data.volumes.nifti import read_image, read_labels, write_labels

FLAT = np.arange(42, dtype=np.int16).reshape(7, 6)
EMPTY_SFORM = {f"srow_{axis}": [0, 0, 0, 0] for axis in "xyz"}


def written(volume, path):
    """Write labels on the grid of a volume, and return what nibabel makes of them."""
    write_labels(path, np.ones(volume.voxels.shape, np.uint8), like=volume)
    return nib.load(path)


def note_of(volume, field):
    return next(note.text for note in volume.notes if note.field == field)


@pytest.mark.parametrize("thickness", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_d40_a_2d_image_is_given_back_as_one(thickness, codes, tmp_path):
    """Writers differ in the third pixdim, which such a file has no use for."""
    fields = {"pixdim": [1, 1, 1.5, thickness, 0, 0, 0, 0], "sform_code": codes[0], "qform_code": codes[1]}
    path = save(tmp_path / "a.nii.gz", FLAT, **fields)
    assert nib.load(path).shape == FLAT.shape
    volume = read_image(path)
    assert volume.voxels.shape == (1, 6, 7)
    assert volume.spacing_mm[1:] == (1.5, 1.0)
    labels = written(volume, tmp_path / "b.nii.gz")
    assert labels.shape == FLAT.shape
    assert np.isfinite(labels.affine).all()
    np.testing.assert_array_equal(read_labels(tmp_path / "b.nii.gz", like=volume).voxels, 1)


def test_d40_a_2d_image_whose_sform_has_no_third_axis(tmp_path):
    path = save(tmp_path / "a.nii", FLAT, srow_z=[0, 0, 0, 7], qform_code=0)
    volume = read_image(path)
    assert "2-D image lacks" in note_of(volume, "sform")
    assert volume.spacing_mm == (1.0, 1.5, 1.0)
    expected = np.diag([1.0, 1.5, 1.0, 1.0])
    expected[2, 3] = 7
    np.testing.assert_array_equal(written(volume, tmp_path / "b.nii").affine, expected)


def test_d40_a_3d_image_without_a_third_axis_is_refused(tmp_path):
    refused(save(tmp_path / "a.nii", srow_z=[0, 0, 0, 7]), "affine (sform)", "independent")


@pytest.mark.parametrize("long", [4e-7, 1e-6, 4e-6])
@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("axes", [(1, 0, 0), (0, 0.6, 0.8), (0.48, 0.6, 0.64)])
def test_d11_d41_a_quaternion_too_long_by_rounding(long, code, axes, tmp_path):
    """Whether it counts or an sform does: nobody who reads what is written meets it again."""
    b, c, d = np.array(axes) * (1 + long)
    path = save(tmp_path / "a.nii.gz", sform_code=code, quatern_b=b, quatern_c=c, quatern_d=d)
    with pytest.raises((ValueError, nib.spatialimages.HeaderDataError)):
        nib.load(path).get_qform()
    volume = read_image(path)
    assert "longer than 1 by rounding" in note_of(volume, "qform")
    qform = written(volume, tmp_path / "b.nii.gz").get_qform()
    turn = 2 * np.outer(axes, axes) - np.eye(3)
    np.testing.assert_allclose(qform[:3, :3], turn * [1, 1.5, 4], atol=1e-5)


def test_d11_d41_a_quaternion_too_long_for_rounding(tmp_path):
    refused(save(tmp_path / "a.nii.gz", sform_code=0, quatern_b=1.0001), "qform", "rotation")


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_d11_d41_zero_pixdim_beside_a_sound_sform(axis, tmp_path):
    pixdim = np.array([1, 1, 1.5, 4, 0, 0, 0, 0])
    pixdim[axis] = 0
    volume = read_image(save(tmp_path / "a.nii.gz", pixdim=pixdim))
    assert [note.field for note in volume.notes] == ["pixdim"]
    assert volume.spacing_mm == (4.0, 1.5, 1.0)
    assert written(volume, tmp_path / "b.nii.gz").header.get_zooms() == (1.0, 1.5, 4.0)


def test_d11_zero_pixdim_without_an_sform(tmp_path):
    refused(save(tmp_path / "a.nii.gz", sform_code=0, pixdim=[1, 1, 0, 4, 0, 0, 0, 0]), "pixdim", "positive")


def test_d12_d41_an_empty_sform_beside_a_qform(tmp_path):
    volume = read_image(save(tmp_path / "a.nii.gz", **EMPTY_SFORM, qoffset_x=30))
    assert "the qform counts" in note_of(volume, "sform")
    affine = SPACING + np.array([[0, 0, 0, 30], *[[0] * 4] * 3])
    np.testing.assert_array_equal(volume.geometry.affine, affine)
    np.testing.assert_array_equal(written(volume, tmp_path / "b.nii.gz").affine, affine)


def test_d11_an_empty_sform_alone(tmp_path):
    refused(save(tmp_path / "a.nii.gz", **EMPTY_SFORM, qform_code=0), "affine (sform)", "independent")


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_d41_a_sound_header_needs_no_mending(codes, tmp_path):
    volume = read_image(save(tmp_path / "a.nii.gz", sform_code=codes[0], qform_code=codes[1]))
    assert [note.field for note in volume.notes] == ([] if any(codes) else ["orientation"])
    assert volume.geometry.dimensions == len(SHAPE)
