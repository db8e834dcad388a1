"""Headers that lie, and those that are only unusual; files are made by hand where nibabel would refuse."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from nifti_files import SHAPE, SPACING, refused, save

from trifuse.architectures.data.volumes.nifti import read_image, read_labels, write_image


@pytest.mark.parametrize("dim", [[3, 0, 6, 5, 1, 1, 1, 1], [3, 7, -6, 5, 1, 1, 1, 1]])
def test_d10_zero_or_negative_dimension(tmp_path, dim):
    refused(save(tmp_path / "a.nii.gz", dim=dim), "dim", "at least one voxel")


@pytest.mark.parametrize("count", [0, 8, -1])
def test_d10_number_of_dimensions(tmp_path, count):
    """Also a count that makes the byte order ambiguous ends in an error, not in a guess."""
    refused(save(tmp_path / "a.nii.gz", dim=[count, 7, 6, 5, 1, 1, 1, 1]), "dim")


def test_d10_the_most_dimensions_that_a_header_has(tmp_path):
    volume = read_image(save(tmp_path / "a.nii.gz", dim=[7, 7, 6, 5, 1, 1, 1, 1]))
    assert volume.voxels.shape == (5, 6, 7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_d11_pixdim(tmp_path, value):
    refused(save(tmp_path / "a.nii.gz", pixdim=[1, 1, value, 4, 0, 0, 0, 0]), "pixdim", "positive")


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [0, 0, 4, 0], [np.nan, 1.5, 0, 0], [0, np.inf, 0, 0]])
def test_d11_affine(tmp_path, row):
    refused(save(tmp_path / "a.nii.gz", srow_y=row), "affine (sform)", "independent")


def test_d11_quaternion(tmp_path):
    path = save(tmp_path / "a.nii.gz", sform_code=0, quatern_b=1, quatern_c=1, quatern_d=1)
    refused(path, "qform", "rotation")


def test_d12_qform_and_sform_disagree(tmp_path):
    volume = read_image(save(tmp_path / "a.nii.gz", qoffset_x=30.00049, srow_x=(1, 0, 0, 0.00049)))
    (note,) = volume.notes
    assert note.field == "qform"
    qform, sform = "[[1.0, 0.0, 0.0, 30.0], [0.0, 1.5, 0.0, 0.0]", "[[1.0, 0.0, 0.0, 0.0], [0.0, 1.5, 0.0, 0.0]"
    assert f"qform {qform}" in note.text
    assert f"sform {sform}" in note.text
    assert "30 voxels apart, the sform counts" in note.text
    np.testing.assert_allclose(volume.geometry.affine, SPACING, atol=1e-3)


def test_d12_invalid_qform_beside_a_good_sform(tmp_path):
    (note,) = read_image(save(tmp_path / "a.nii.gz", quatern_b=1, quatern_c=1, quatern_d=1)).notes
    assert note.field == "qform"


def test_d12_rule(tmp_path):
    """The sform counts where it is set, then the qform, then pixdim alone."""
    moved = {"qoffset_x": 30, "srow_x": [1, 0, 0, 99]}
    assert read_image(save(tmp_path / "a.nii.gz", **moved)).geometry.affine[0, 3] == 99
    assert read_image(save(tmp_path / "b.nii.gz", **moved, sform_code=0)).geometry.affine[0, 3] == 30
    bare = read_image(save(tmp_path / "c.nii.gz", **moved, sform_code=0, qform_code=0))
    assert bare.notes[0].field == "orientation"
    assert bare.spacing_mm == (4.0, 1.5, 1.0)


def test_d12_pixdim_disagrees(tmp_path):
    volume = read_image(save(tmp_path / "a.nii.gz", pixdim=[1, 1, 3, 4, 0, 0, 0, 0], qform_code=0))
    assert [note.field for note in volume.notes] == ["pixdim"]
    assert volume.spacing_mm == (4.0, 1.5, 1.0)


@pytest.mark.parametrize(
    ("unit", "scale", "expected", "field"),
    [
        ("meter", 1e-3, (4.0, 1.5, 1.0), "spacing"),
        ("micron", 1e3, (4.0, 1.5, 1.0), "spacing"),
        ("unknown", 1, (4.0, 1.5, 1.0), "units"),
        ("mm", 1e-3, (0.004, 0.0015, 0.001), "spacing"),
        ("mm", 1e3, (4000.0, 1500.0, 1000.0), "spacing"),
    ],
)
def test_d14_units_and_implausible_spacing(tmp_path, unit, scale, expected, field):
    affine = SPACING * [[scale], [scale], [scale], [1]]
    volume = read_image(save(tmp_path / "a.nii.gz", affine=affine, unit=unit))
    np.testing.assert_allclose(volume.spacing_mm, expected, rtol=1e-6)
    assert [note.field for note in volume.notes] == [field]


def test_d14_unknown_unit_code(tmp_path):
    (note,) = read_image(save(tmp_path / "a.nii.gz", xyzt_units=5)).notes
    assert note.field == "spacing"
    assert "unknown code, 5" in note.text


@pytest.mark.parametrize("field", ["scl_slope", "scl_inter"])
def test_infinite_slope(tmp_path, field):
    refused(save(tmp_path / "a.nii.gz", **{"scl_slope": 1, field: np.inf}), "scl_slope", "finite")


def test_slope_is_applied(tmp_path):
    plain = read_image(save(tmp_path / "a.nii.gz")).voxels
    scaled = read_image(save(tmp_path / "b.nii.gz", scl_slope=2, scl_inter=-5)).voxels
    np.testing.assert_array_equal(scaled, plain * 2 - 5)
    np.testing.assert_array_equal(read_image(save(tmp_path / "c.nii.gz", scl_slope=0, scl_inter=9)).voxels, plain)


def test_vox_offset(tmp_path):
    refused(save(tmp_path / "a.nii.gz", vox_offset=10), "vox_offset")
    refused(save(tmp_path / "a.nii.gz", vox_offset=np.nan), "vox_offset")
    read_image(save(tmp_path / "a.nii.gz", vox_offset=0))


@pytest.mark.parametrize("code", [128, 2304])
def test_d21_rgb(tmp_path, code):
    refused(save(tmp_path / "a.nii.gz", datatype=code), "RGB NIfTI", "grey")


@pytest.mark.parametrize("code", [0, 1, 32, 1536, 9999])
def test_other_datatypes_are_refused(tmp_path, code):
    refused(save(tmp_path / "a.nii.gz", datatype=code), "datatype", str(code))


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_types_and_byte_orders(tmp_path, dtype, order):
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    header.set_xyzt_units("mm")
    path = tmp_path / "a.nii"
    nib.Nifti1Image(array, SPACING, header).to_filename(path)
    volume = read_image(path)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.geometry.to_native(volume.voxels), array)
    np.testing.assert_array_equal(read_labels(path).voxels, volume.voxels)


def test_nifti2(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    nib.Nifti2Image(array, SPACING).to_filename(tmp_path / "a.nii.gz")
    volume = read_image(tmp_path / "a.nii.gz")
    write_image(tmp_path / "b.nii.gz", volume.voxels, like=volume)
    again = nib.load(tmp_path / "b.nii.gz")
    assert isinstance(again, nib.Nifti2Image)
    np.testing.assert_array_equal(again.get_fdata(), array)
    np.testing.assert_array_equal(again.affine, SPACING)
