"""Label maps on disk to bull's-eyes: the segments of the first, landmarks as they are marked in its file, in mL."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pytest
from ring_heart import axes_of, ring_heart

from trifuse.architectures.taff_unet.bullseye import plot_scar_bullseyes
from trifuse.kernels import DataError

HEART = ring_heart(axes_of(5), screen_deg=200.0)
VOXEL_ML = 8.0 * 1.5 * 1.2 / 1000


def write(path, labels, unit="mm"):
    """Write (D, H, W) with columns, rows and slices as native axes i, j and k."""
    path.parent.mkdir(exist_ok=True)
    affine = HEART.affine[:, [2, 1, 0, 3]]
    image = nib.Nifti1Image(labels.transpose(2, 1, 0), affine)
    if unit == "micron":
        image = nib.Nifti1Image(labels.transpose(2, 1, 0), np.diag([1000, 1000, 1000, 1.0]) @ affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def with_scar(segment):
    return np.where((HEART.truth == segment) & HEART.clear, 3, HEART.labels).astype(np.uint8)


def read(picture):
    with open(picture.csv, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("unit", ["mm", "micron"])
def test_scar_lies_in_the_segments_of_the_first_map(tmp_path, unit):
    """Landmarks are indices of its file; what a prediction calls scar outside of its wall is unassigned."""
    truth, prediction = with_scar(3), with_scar(4)
    prediction[0, 0, :4] = 3
    paths = [write(tmp_path / f"{name}.nii.gz", labels, unit) for name, labels in (("a", truth), ("b", prediction))]
    marks = {"rv_anterior": HEART.anterior[::-1], "rv_inferior": HEART.inferior[::-1]}
    picture, notes = plot_scar_bullseyes(paths, tmp_path / "out", reference="landmarks", **marks)
    lines = read(picture)
    assert list(lines[0]) == ["segment", "name", "a (mL)", "b (mL)"]
    for column, segment, labels in (("a (mL)", 3, truth), ("b (mL)", 4, prediction)):
        volumes = [float(line[column]) for line in lines]
        inside = (labels == 3) & HEART.wall
        assert volumes[segment - 1] == pytest.approx(inside.sum() * VOXEL_ML, rel=1e-3)
        assert sum(volumes[:17]) == pytest.approx(volumes[segment - 1])
    assert float(lines[17]["b (mL)"]) == pytest.approx(4 * VOXEL_ML, rel=1e-3)
    assert float(lines[17]["a (mL)"]) == 0
    assert picture.title == "Scar volume, AHA-17 segments of a by landmarks"
    assert len(notes) == 1


def test_wall_by_the_right_ventricle_or_an_angle(tmp_path):
    labels = np.where(HEART.rv, 9, np.where(HEART.labels == 1, 5, HEART.labels)).astype(np.uint8)
    path = write(tmp_path / "heart.nii", labels)
    classes = {"cavity": (5,), "wall": (2,), "of": "wall"}
    picture, _ = plot_scar_bullseyes([path], tmp_path / "rv", reference="rv_mask", rv_class=9, **classes)
    volumes = np.array([float(line["heart (mL)"]) for line in read(picture)])
    expected = np.bincount(HEART.truth.flat, minlength=18)[1:] * VOXEL_ML
    np.testing.assert_allclose(volumes[:17], expected, rtol=0.1)
    assert "wall volume in mL" in picture.alt
    forced, _ = plot_scar_bullseyes(
        [path], tmp_path / "angle", reference="fixed_angle", angle_deg=10.0, centre="global", **classes
    )
    assert read(forced) != read(picture)


def test_maps_are_told_apart_by_name(tmp_path):
    labels = with_scar(3)
    marks = {"reference": "fixed_angle", "angle_deg": 0.0}
    truth, prediction = (write(tmp_path / folder / "a.nii.gz", labels) for folder in ("seg", "pred"))
    picture, _ = plot_scar_bullseyes([truth, prediction], tmp_path / "out", **marks)
    assert list(read(picture)[0])[2:] == ["seg/a (mL)", "pred/a (mL)"]
    other = write(tmp_path / "run" / "a.nii.gz", labels)
    (tmp_path / "run" / "seg").mkdir()
    other = other.rename(tmp_path / "run" / "seg" / "a.nii.gz")
    picture, _ = plot_scar_bullseyes([truth, other], tmp_path / "out", **marks)
    assert list(read(picture)[0])[2:] == [f"{truth} (mL)", f"{other} (mL)"]


def test_maps_of_other_hearts_are_refused(tmp_path):
    truth = write(tmp_path / "a.nii.gz", with_scar(3))
    other = write(tmp_path / "b.nii.gz", with_scar(3)[:, 2:])
    with pytest.raises(DataError, match=r"b\.nii\.gz: shape"):
        plot_scar_bullseyes([truth, other], tmp_path / "out", reference="orientation")
    assert not (tmp_path / "out").exists()


def test_values_that_stand_for_nothing_are_said(tmp_path):
    first = write(tmp_path / "truth" / "a.nii.gz", with_scar(7))
    mask = np.where(HEART.labels > 1, 255, HEART.labels).astype(np.uint8)
    other = write(tmp_path / "other" / "b.nii.gz", mask)
    _, notes = plot_scar_bullseyes([first, other], tmp_path / "out", reference="fixed_angle", angle_deg=10.0)
    assert notes[-2:] == [
        "b: values 255 are neither blood pool, wall nor scar",
        "b: no voxel has the value 3 of the scar",
    ]
