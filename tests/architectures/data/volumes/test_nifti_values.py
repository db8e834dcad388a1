"""What is read: dimensions, voxels and labels."""

from __future__ import annotations

import os

import nibabel as nib
import numpy as np
import pytest
from nifti_files import SHAPE, SPACING, refused, save

from trifuse.architectures.data.volumes.nifti import read_image, read_labels, write_image, write_labels
from trifuse.kernels.errors import DataError

# ------------------------------------------------------------------------------------------ dimensions


def test_d20_singleton_is_dropped_with_a_note(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(*SHAPE, 1, 1)
    volume = read_image(save(tmp_path / "a.nii.gz", array))
    np.testing.assert_array_equal(volume.geometry.to_native(volume.voxels), array[..., 0, 0])
    assert [note.field for note in volume.notes] == ["dim"]


def test_d20_cine_needs_a_frame(tmp_path):
    array = np.arange(np.prod(SHAPE) * 3, dtype=np.int16).reshape(*SHAPE, 3)
    path = save(tmp_path / "cine.nii.gz", array)
    refused(path, "(7, 6, 5, 3)", "frame=0 to frame=2")
    for frame in range(3):
        volume = read_image(path, frame=frame)
        np.testing.assert_array_equal(volume.geometry.to_native(volume.voxels), array[..., frame])
    for frame in (-1, 3):
        refused(path, "frame: expected 0 to 2 for a file of shape (7, 6, 5, 3)", frame=frame)


def test_d20_labels_have_frames_or_are_those_of_one(tmp_path):
    array = np.arange(np.prod(SHAPE) * 3, dtype=np.int16).reshape(*SHAPE, 3)
    image = read_image(save(tmp_path / "cine.nii.gz", array), frame=1)
    refused(tmp_path / "cine.nii.gz", "frame=0 to frame=2", read=read_labels, like=image)
    every = read_labels(tmp_path / "cine.nii.gz", like=image, frame=1)
    one = read_labels(save(tmp_path / "one.nii.gz", array[..., 1]), like=image, frame=1)
    lone = read_labels(save(tmp_path / "lone.nii.gz", array[..., 1:2]), like=image, frame=1)
    for labels in (every, one, lone):
        np.testing.assert_array_equal(labels.geometry.to_native(labels.voxels), array[..., 1])
    fewer = save(tmp_path / "fewer.nii.gz", array[..., :2])
    refused(fewer, "frames: expected one, or 3 as ", "cine.nii.gz, got 2", read=read_labels, like=image, frame=1)


def test_d20_frame_of_a_3d_file_or_of_two_time_axes(tmp_path):
    refused(save(tmp_path / "a.nii.gz"), "frame: expected none for a file of shape (7, 6, 5), got 0", frame=0)
    refused(save(tmp_path / "b.nii.gz", np.zeros((*SHAPE, 2, 2), np.int16)), "frame: expected none", frame=0)


def test_d24_one_slice(tmp_path):
    """The axis with one voxel is the slice axis, whatever the spacing says; with two of them the spacing decides."""
    path = save(tmp_path / "a.nii.gz", np.arange(42, dtype=np.int16).reshape(7, 1, 6), np.diag([2.0, 1, 3, 1]))
    volume = read_image(path)
    assert volume.voxels.shape == (1, 6, 7)
    assert volume.spacing_mm == (1.0, 3.0, 2.0)
    assert read_image(save(tmp_path / "b.nii.gz", np.ones((7, 1, 1), np.int16))).voxels.shape == (1, 1, 7)


# ---------------------------------------------------------------------------------------------- voxels


def test_d22_nonfinite_voxels(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    array[2, 1, 3], array[4, 0, 0] = np.nan, -np.inf
    path = save(tmp_path / "a.nii.gz", array)
    refused(path, "2 NaN or infinite voxels (0.952%)", "(2, 1, 3)", 'nonfinite="zero"')
    good = np.isfinite(array)
    for policy, fill in (("zero", 0.0), ("median", np.median(array[good]))):
        volume = read_image(path, nonfinite=policy)
        native = volume.geometry.to_native(volume.voxels)
        np.testing.assert_array_equal(native[good], array[good])
        assert set(native[~good]) == {np.float32(fill)}
        assert [note.field for note in volume.notes] == ["voxels"]


def test_d22_nothing_finite(tmp_path):
    refused(save(tmp_path / "a.nii.gz", np.full(SHAPE, np.nan, np.float32)), "100.000%", nonfinite="median")


def test_d22_beyond_float32(tmp_path):
    refused(save(tmp_path / "a.nii.gz", np.full(SHAPE, 1e300)), "infinite")


def test_d22_unknown_policy(good):
    with pytest.raises(ValueError, match="expected one of 'error', 'zero', 'median', got 'ignore'"):
        read_image(good, nonfinite="ignore")


def test_d23_constant_image(tmp_path):
    (note,) = read_image(save(tmp_path / "a.nii.gz", np.full(SHAPE, 7, np.int16))).notes
    assert "same value, 7" in note.text


# ---------------------------------------------------------------------------------------------- labels


def test_d18_slope_and_float_labels(tmp_path):
    stored = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 3
    sloped = save(tmp_path / "a.nii.gz", (stored * 2).astype(np.int16), scl_slope=0.49999997, scl_inter=0)
    for path in (sloped, save(tmp_path / "b.nii.gz", stored + 9e-4)):
        labels = read_labels(path)
        np.testing.assert_array_equal(labels.geometry.to_native(labels.voxels), stored)
        assert labels.voxels.dtype == np.uint8
    wrong = stored.astype(np.float32)
    wrong[1, 2, 3] += 0.25
    refused(save(tmp_path / "c.nii.gz", wrong), "labels", "at voxel (1, 2, 3)", "0.001", read=read_labels)
    wrong[1, 2, 3] = np.nan
    refused(save(tmp_path / "d.nii.gz", wrong), "1 NaN", read=read_labels)


@pytest.mark.parametrize(
    ("dtype", "high", "written"),
    [
        (bool, 1, "u1"),
        ("i8", 255, "u1"),
        ("i8", 256, "i2"),
        ("i2", -1, "i2"),
        ("u2", 40000, "u2"),
        ("u8", 70000, "i4"),
        ("i8", -70000, "i4"),
    ],
)
def test_d19_smallest_safe_type(good, tmp_path, dtype, high, written):
    like = read_image(good)
    labels = np.zeros(like.voxels.shape, dtype)
    labels[1, 2, 3] = high
    write_labels(tmp_path / "b.nii.gz", labels, like)
    assert nib.load(tmp_path / "b.nii.gz").get_data_dtype() == np.dtype(written)
    np.testing.assert_array_equal(read_labels(tmp_path / "b.nii.gz", like=like).voxels, labels)


def test_d19_refusals(good, tmp_path):
    like, path = read_image(good), tmp_path / "b.nii.gz"
    for labels, word in (
        (like.voxels, "float32"),
        (np.full(like.voxels.shape, 2**40), "32 bits"),
        (np.zeros((3, 3, 3), np.uint8), "(5, 6, 7)"),
    ):
        with pytest.raises(DataError, match=str(path)) as caught:
            write_labels(path, labels, like)
        assert word in str(caught.value)
    with pytest.raises(DataError, match="expected one of uint8, int16, uint16, int32, float32, got type bool"):
        write_image(path, like.voxels > 0, like)
    with pytest.raises(DataError, match="ends in"):
        write_labels(tmp_path / "b.mha", np.zeros(like.voxels.shape, np.uint8), like)
    assert os.listdir(tmp_path) == ["good.nii.gz"]


def test_d15_labels_of_another_shape(good, tmp_path):
    other = save(tmp_path / "b.nii.gz", np.zeros((7, 6, 4), np.uint8))
    refused(other, "(4, 6, 7)", "(5, 6, 7)", "another image", read=read_labels, like=read_image(good))


@pytest.mark.parametrize(("shift", "notes"), [(0.0, 0), (0.009, 0), (0.4, 1)])
def test_d16_small_shifts_are_tolerated(good, tmp_path, shift, notes):
    affine = SPACING.copy()
    affine[0, 3] = shift
    path = save(tmp_path / "b.nii.gz", np.zeros(SHAPE, np.uint8), affine)
    assert len(read_labels(path, like=read_image(good)).notes) == notes


def test_d16_gross_shift(good, tmp_path):
    affine = SPACING.copy()
    affine[0, 3] = 0.6
    path = save(tmp_path / "b.nii.gz", np.zeros(SHAPE, np.uint8), affine)
    refused(path, "0.6 voxels away", "at most 0.5", read=read_labels, like=read_image(good))


def test_d16_labels_stored_the_other_way_round(good, tmp_path):
    """Labels in another axis order, but in the same place, are shown as their image is."""
    image = read_image(good)
    stored = np.arange(np.prod(SHAPE), dtype=np.uint8).reshape(SHAPE)
    affine = SPACING.copy()
    affine[:3, 0] *= -1
    affine[0, 3] = SHAPE[0] - 1
    path = save(tmp_path / "b.nii.gz", np.ascontiguousarray(stored[::-1]).transpose(1, 0, 2), affine[:, [1, 0, 2, 3]])
    np.testing.assert_array_equal(read_labels(path, like=image).voxels, image.geometry.to_display(stored))


def test_d16_oblique_tie_is_broken_as_the_image_breaks_it(tmp_path):
    """At 45 degrees a rounding error decides which axis is shown where: the image decides for both."""
    turn = np.eye(4)
    for angle in (np.pi / 4 - 1e-5, np.pi / 4 + 1e-5):
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        save(tmp_path / f"{angle > np.pi / 4}.nii.gz", np.arange(216, dtype=np.uint8).reshape(6, 6, 6), turn @ SPACING)
    image = read_image(tmp_path / "True.nii.gz")
    assert read_image(tmp_path / "False.nii.gz").geometry.flips != image.geometry.flips
    np.testing.assert_array_equal(read_labels(tmp_path / "False.nii.gz", like=image).voxels, image.voxels)
