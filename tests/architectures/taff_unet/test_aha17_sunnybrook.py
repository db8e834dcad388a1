"""Real hearts without a label of the right ventricle: its bright blood must lie beyond the septal segments."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import ndimage

from trifuse.architectures.data.volumes.nifti import read_image, read_labels
from trifuse.architectures.taff_unet.aha17 import aha17_labels
from trifuse.architectures.taff_unet.bullseye import plot_scar_bullseyes

# case, end-diastolic frame, whether its most basal slice is open
CASES = (("SC-HF-I-1", "19", True), ("SC-HF-I-2", "20", False), ("SC-HF-I-4", "20", False))
CLASSES = {"cavity": (3,), "wall": (2,)}


@pytest.mark.parametrize(("case", "frame", "is_open"), CASES)
def test_septal_segments_face_the_right_ventricle(trifuse_data, case, frame, is_open):
    folder = trifuse_data / "sunnybrook_cine_sax" / case
    image = read_image(folder / f"{case}_frame{frame}.nii.gz")
    labels = read_labels(folder / f"{case}_frame{frame}_gt.nii.gz", like=image)
    notes: list[str] = []
    affine = image.geometry.display_affine
    segments = aha17_labels(labels.voxels, affine, reference="orientation", **CLASSES, note=notes.append)
    np.testing.assert_array_equal(segments > 0, labels.voxels == 2)
    assert notes[0] == "base taken at the last slice, where the cavity is larger"  # slices run from the feet upwards
    assert len(notes) == 1 + is_open

    # segments grown outwards by 4 to 10 mm, in the basal and mid slices, where the right ventricle is
    sides_mm = image.spacing_mm[1:]
    beyond: dict[int, list[float]] = {wall: [] for wall in range(6)}
    for index in np.flatnonzero(((segments > 0) & (segments < 13)).any((1, 2))):
        heart = np.isin(labels.voxels[index], (2, 3))
        distance_mm, nearest = ndimage.distance_transform_edt(
            segments[index] == 0, sampling=sides_mm, return_indices=True
        )
        around = (distance_mm > 4) & (distance_mm < 10) & ~heart
        walls = (segments[index][tuple(nearest)].astype(int) - 1) % 6
        for wall in range(6):
            beyond[wall].extend(image.voxels[index][around & (walls == wall)])
    brightness = {wall: np.median(values) for wall, values in beyond.items()}
    septal, free = min(brightness[1], brightness[2]), max(brightness[4], brightness[5])
    assert septal > 2 * free  # blood against lung
    rows = {
        wall: np.argwhere((segments > 0) & (segments < 13) & ((segments.astype(int) - 1) % 6 == wall))[:, 1].mean()
        for wall in (0, 3)
    }
    assert rows[0] < rows[3]  # the anterior wall lies above the inferior one


def test_bullseye_of_a_real_wall(trifuse_data, tmp_path):
    path = trifuse_data / "sunnybrook_cine_sax" / "SC-HF-I-2" / "SC-HF-I-2_frame20_gt.nii.gz"
    picture, notes = plot_scar_bullseyes([path], tmp_path, reference="orientation", of="wall", **CLASSES)
    with open(picture.csv, newline="") as stream:
        lines = list(csv.DictReader(stream))
    volumes = [float(line["SC-HF-I-2_frame20_gt (mL)"]) for line in lines]
    labels = read_labels(path)
    wall_ml = (labels.voxels == 2).sum() * np.prod(labels.spacing_mm) / 1000
    assert sum(volumes) == pytest.approx(wall_ml, rel=1e-3)
    assert 4 < min(volumes[:16]) < max(volumes[:16]) < 15
    assert volumes[16:] == [0, 0]  # no tip was contoured, and nothing lies outside
    assert len(notes) == 1
