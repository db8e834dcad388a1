"""The scar's share of each AHA segment: of labels numbered in any way, by hand, and refused where names are missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ring_heart import axes_of, ring_heart

from trifuse.architectures.data.layouts.cohort import Case
from trifuse.architectures.data.volumes.nifti import new_volume
from trifuse.architectures.taff_unet.aha17 import aha17_labels
from trifuse.architectures.taff_unet.inputs import UndividedWall
from trifuse.architectures.taff_unet.segment_readouts import check_scar_classes, segment_burdens
from trifuse.kernels import DataError

NAMES = ("background", "scar", "fat", "blood pool", "myocardium")  # not the numbers of the layout
HEART = ring_heart(axes_of(3))
IMAGE = new_volume(np.array([0, 3, 4], np.uint8)[HEART.labels], HEART.affine)
CASE = Case("a", "p", Path("a.nii.gz"), None)


def segments():
    standard = np.array([0, 0, 0, 1, 2], np.uint8)[IMAGE.voxels]
    return aha17_labels(standard, IMAGE.affine_mm, reference="orientation")


def test_shares_by_hand():
    """Every other voxel of segment 4 is scar, and all of it is predicted, with as much beside the wall."""
    fourth = np.flatnonzero(segments() == 4)
    truth, prediction = IMAGE.voxels.copy(), IMAGE.voxels.copy()
    truth.flat[fourth[::2]] = 1
    prediction.flat[fourth] = 1
    prediction[IMAGE.voxels == 3] = 1
    found = segment_burdens(CASE, replace(IMAGE, voxels=truth), prediction, NAMES, "orientation")
    assert [each.segment for each in found] == list(range(1, 18))
    share = 100 * len(fourth[::2]) / len(fourth)
    expected = {4: (pytest.approx(share), pytest.approx(100))}
    assert [(each.truth, each.prediction) for each in found] == [expected.get(s, (0, 0)) for s in range(1, 18)]
    first = found[0]
    assert (first.case_id, first.patient, first.quantity, first.class_name, first.unit) == (
        "a",
        "p",
        "burden",
        "scar",
        "%",
    )
    assert first.method == "of the true wall of the segment, angles from orientation"


def test_without_a_prediction_the_truth_alone_is_known():
    found = segment_burdens(CASE, IMAGE, None, NAMES, "orientation")
    assert [each.truth for each in found] == [0] * 17
    assert all(math.isnan(each.prediction) for each in found)


def test_rejects():
    with pytest.raises(UndividedWall, match="a: wall"):
        segment_burdens(CASE, replace(IMAGE, voxels=np.zeros_like(IMAGE.voxels)), None, NAMES, "orientation")
    with pytest.raises(DataError, match="insertions of the right ventricle"):
        segment_burdens(CASE, IMAGE, None, NAMES, "landmarks")
    check_scar_classes("folder", NAMES)
    with pytest.raises(DataError, match="folder: classes: expected also blood pool, scar, got lv, myocardium"):
        check_scar_classes("folder", ("background", "lv", "myocardium"))
