"""The 17 segments against a published tool's, where the conventions of the two agree.

What agrees: the order of segments, where sectors lie, the edges of every level. The tool measures angles from the
middle of the anterior wall, and the septum's middle lies at 90; ours start at the anterior insertion of the right
ventricle, 30 degrees on. So ours are its less 30, and all its sectors become ours, the apical ones, too.

What differs, and is therefore not compared: it measures about the cavity's centroid, not the filled epicardium's (up
to 1.2 degrees here), so voxels near an edge are left out; it cuts n slices at ceil(n / 3) and ceil(2 n / 3), not at
thirds of the middles; it orders slices by the world's third axis, also where the cavity says otherwise (heart_c). Its
septum need not face the phantoms' right ventricle, which is why its own axes serve as landmarks. The second tool cuts
by the edges of the right ventricle, in unequal sectors: no convention of ours.
"""

from __future__ import annotations

import numpy as np
import pytest
from golden_numbers import fixture_names, load_fixture

from trifuse.architectures.taff_unet.aha17 import aha17_labels, sector
from trifuse.kernels import DataError

HEARTS = ("aha17/heart_a", "aha17/heart_b", "aha17/heart_c_flipz")
INSERTION_DEG = 30.0  # the anterior insertion, by the tool's angles
SECTOR_DEG = {"basal": 60, "mid": 60, "apical": 90}


def load(name):
    fixture = load_fixture(name)
    return {key: tensor.numpy() for key, tensor in fixture.tensors.items()}, fixture.facts


def from_edge(level: str, tool_deg: np.ndarray) -> np.ndarray:
    """Degrees to the nearest edge of a sector, by the tool's angles; its first sector is centred on 0."""
    width = SECTOR_DEG[level]
    return np.abs(tool_deg % width - width / 2)


def landmarks(tensors, cavity: np.ndarray) -> dict[str, np.ndarray]:
    """The insertions of each slice, 15 mm from the tool's centre, 30 and 150 degrees from its anterior direction."""
    to_index = np.linalg.inv(tensors["affine"][:2, :2].astype(float))
    points = {}
    for name, degrees in (("rv_anterior", INSERTION_DEG), ("rv_inferior", INSERTION_DEG + 120)):
        angle = np.deg2rad(degrees)
        way = np.cos(angle) * tensors["inf_to_ant"][:2] + np.sin(angle) * tensors["lv_to_sep"][:2]
        centres = [np.argwhere(plane).mean(0) if plane.any() else (0, 0) for plane in np.moveaxis(cavity, 2, 0)]
        points[name] = np.array(centres) + to_index @ (15 * way)
    return points


def test_every_fixture_is_used():
    assert set(fixture_names("aha17")) == {"aha17/angle_table", *HEARTS}


def test_table_of_angles():
    tensors, facts = load("aha17/angle_table")
    for level, expected in zip(facts["rows"], tensors["segment"], strict=True):
        np.testing.assert_array_equal(sector(level, tensors["angle_deg"] - INSERTION_DEG), expected)


@pytest.mark.parametrize("name", HEARTS)
def test_segment_of_every_voxel_by_the_tools_angle(name):
    """All of its voxels, in its levels, but for those within half a degree of an edge."""
    tensors, facts = load(name)
    compared = 0
    for index, level in facts["slice_parts"].items():
        theirs, degrees = (tensors[key][..., int(index)] for key in ("aha_labels", "angle_deg"))
        clear = (theirs > 0) & (from_edge(level, degrees) > 0.5)
        np.testing.assert_array_equal(sector(level, degrees[clear] - INSERTION_DEG), theirs[clear])
        compared += clear.sum()
    assert compared > 0.95 * (tensors["aha_labels"] > 0).sum()


@pytest.mark.parametrize("name", HEARTS)
def test_segments_from_labels_and_affine(name):
    """The whole way from labels, in the slices that both put into one level, 2.5 degrees off the edges."""
    tensors, facts = load(name)
    labels, cavity = tensors["seg"], tensors["seg"] == 1
    by_landmarks = {"reference": "landmarks", "wall": (2,), "slice_axis": 2, **landmarks(tensors, cavity)}
    if name.endswith("flipz"):  # the tool takes the slice with the smallest cavity for the base
        with pytest.raises(DataError, match="base_first=True"):
            aha17_labels(labels, tensors["affine"], **by_landmarks, base_first=True)
    ours = aha17_labels(labels, tensors["affine"], **by_landmarks)
    np.testing.assert_array_equal(ours > 0, labels == 2)
    compared = 0
    for index, level in facts["slice_parts"].items():
        mine, theirs, degrees = (part[..., int(index)] for part in (ours, tensors["aha_labels"], tensors["angle_deg"]))
        clear = (theirs > 0) & (from_edge(level, degrees) > 2.5)
        if set(np.unique(mine[clear])) == set(np.unique(theirs[clear])):
            np.testing.assert_array_equal(mine[clear], theirs[clear])
            compared += 1
    assert compared == {"aha17/heart_a": 7, "aha17/heart_b": 9, "aha17/heart_c_flipz": 2}[name]
