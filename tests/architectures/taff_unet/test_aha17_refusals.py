"""E10: what cannot be divided is refused, with the slice and what to do; and the volumes of what can be."""

from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest
from ring_heart import axes_of, ring_heart

from trifuse.architectures.taff_unet.aha17 import aha17_labels, aha17_map, scar_burden_ml, wall_volume_ml
from trifuse.kernels import DataError, MissingExtra, ShapeError

HEART = ring_heart(axes_of(3))
DEPTH, HEIGHT, WIDTH = HEART.labels.shape


def divide(labels=HEART.labels, affine=HEART.affine, **options):
    return aha17_labels(labels, affine, **({"reference": "fixed_angle", "angle_deg": 0.0} | options))


def test_the_reference_has_no_default():
    for function in (aha17_labels, aha17_map):
        parameter = inspect.signature(function).parameters["reference"]
        assert parameter.default is parameter.empty
        with pytest.raises(TypeError, match="reference"):
            function(HEART.labels, HEART.affine)


def test_e10_no_myocardium():
    with pytest.raises(DataError, match=r"myocardium: expected wall, class 2 or 3, got classes \[0, 1\] .* 0 to 8"):
        divide(np.where(HEART.wall, 0, HEART.labels))
    with pytest.raises(DataError, match="expected wall, class 7, got classes"):
        divide(wall=(7,))


def test_e10_a_ring_that_closes_nowhere():
    """The message names the slice that comes nearest."""
    labels = HEART.labels[:8].copy()
    labels[:, :, :29] = 0
    labels[4] = HEART.labels[4]
    labels[4, :22, :29] = 0
    for base_first in (None, True):
        with pytest.raises(DataError, match=r"closed in no slice: .* in the best slice, 4; check which classes"):
            divide(labels, base_first=base_first)


def test_e10_walls_without_any_cavity():
    labels = np.where(HEART.labels > 0, 2, 0)
    with pytest.raises(DataError, match=r"closed in no slice: .*cavity of 10 pixels, got .*cavity of 0 pixels"):
        divide(labels)


@pytest.mark.parametrize(("labels", "said", "apical"), [(HEART.labels, False, 0), (HEART.labels[::-1], True, 8)])
def test_e10_slices_in_reversed_order(labels, said, apical):
    with pytest.raises(
        DataError, match=f"base_first={said}: .* slice {apical}, said to be apical.*base_first={not said}"
    ):
        divide(labels, base_first=said)
    assert divide(labels, base_first=not said).max() == 17


def test_stacks_of_nearly_one_width_are_ordered_as_one_says():
    labels = HEART.labels[[2, 1, 0]]
    assert (divide(labels, base_first=True)[0] < 7).all()


@pytest.mark.parametrize(
    ("reference", "missing"), [("landmarks", "rv_anterior"), ("rv_mask", "rv_mask"), ("fixed_angle", "angle_deg")]
)
def test_e10_no_insertion_of_the_right_ventricle(reference, missing):
    want = f"insertion of the right ventricle in slices 0 to 7: expected {missing}, .*; mark the insertion, or take"
    with pytest.raises(DataError, match=want):
        divide(reference=reference, angle_deg=None)


@pytest.mark.parametrize("angle", [np.nan, np.inf, 1e30, -361])
def test_e10_an_angle_that_is_none(angle):
    with pytest.raises(DataError, match="angle_deg: expected degrees, from -360 to 360, got"):
        divide(angle_deg=angle)


@pytest.mark.parametrize("name", ["rv_anterior", "rv_inferior"])
@pytest.mark.parametrize("point", [(np.nan, np.nan), (5.0, WIDTH), (-1.0, 5.0), ((HEIGHT - 1) / 2, (WIDTH - 1) / 2)])
def test_e10_an_insertion_that_one_slice_lacks(name, point):
    points = np.tile(np.array(getattr(HEART, name.removeprefix("rv_"))), (DEPTH, 1))
    points[5] = point
    with pytest.raises(DataError, match=f"{name} of slice 5: expected .row, column. within {HEIGHT} x {WIDTH} pixels"):
        divide(**HEART.landmarks() | {name: points})
    points[5], points[8] = points[4], np.nan  # the apex needs none
    np.testing.assert_array_equal(divide(**HEART.landmarks() | {name: points}), divide(**HEART.landmarks()))


def test_e10_both_insertions_in_one_direction():
    with pytest.raises(DataError, match=r"both in one direction, .* in slice 0"):
        divide(reference="landmarks", rv_anterior=HEART.anterior, rv_inferior=HEART.anterior)


def test_an_anterior_insertion_alone_runs_as_the_affine_says():
    notes: list[str] = []
    alone = divide(reference="landmarks", rv_anterior=HEART.anterior, note=notes.append)
    np.testing.assert_array_equal(alone, divide(**HEART.landmarks()))
    assert "no inferior insertion is known: the affine tells which way angles run" in notes


def test_e10_a_right_ventricle_that_touches_nothing():
    far = np.zeros(HEART.labels.shape, bool)
    far[:, :2, :2] = True
    for rv_mask in (far, np.zeros_like(far)):
        with pytest.raises(DataError, match="touches the left ventricle in none of slices 0 to 7"):
            divide(reference="rv_mask", rv_mask=rv_mask)


def test_a_slice_without_contact_takes_the_nearest_ones():
    part = HEART.rv.copy()
    part[[0, 3, 6, 7]] = False
    part[2, :2, :2] = True  # an island is no contact
    found = divide(reference="rv_mask", rv_mask=part)
    assert (found == HEART.truth)[HEART.clear].mean() > 0.97


def test_slices_that_face_the_septum_have_no_orientation():
    facing = np.linalg.qr(np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]).T)[0]
    heart = ring_heart(facing, screen_deg=0.0)
    with pytest.raises(DataError, match="orientation: expected slices across the left ventricle"):
        divide(heart.labels, heart.affine, reference="orientation")


def test_unusable_arguments():
    with pytest.raises(ShapeError, match="labels must have three axes"):
        divide(HEART.labels[0])
    with pytest.raises(TypeError, match="labels must be integers, got float32"):
        divide(HEART.labels.astype(np.float32))
    with pytest.raises(ShapeError, match=r"affine must be \(4, 4\), got \(3, 3\)"):
        divide(affine=HEART.affine[:3, :3])
    for affine in (np.zeros((4, 4)), HEART.affine * np.nan):
        with pytest.raises(DataError, match="affine: expected three independent axes"):
            divide(affine=affine)
    with pytest.raises(
        ValueError, match="reference: expected one of 'landmarks', 'rv_mask', 'orientation', 'fixed_angle'"
    ):
        divide(reference="guess")
    with pytest.raises(ValueError, match="centre: expected one of 'slice', 'global'"):
        divide(centre="volume")
    with pytest.raises(ShapeError, match="rv_mask must have the shape of the labels"):
        divide(reference="rv_mask", rv_mask=HEART.rv[:2])
    with pytest.raises(ShapeError, match=rf"rv_anterior must be .*\({DEPTH}, 2\), got \(3,\)"):
        divide(reference="landmarks", rv_anterior=(1.0, 2.0, 3.0))


def test_scar_volume_of_each_segment():
    """In mL, of an oblique affine; what lies outside of the wall is told apart."""
    segments = divide()
    labels = HEART.labels.copy()
    labels[segments == 4] = 3
    labels[(segments == 17) & (np.cumsum(segments == 17).reshape(segments.shape) <= 5)] = 3
    labels[0, 0, :3] = 3
    burden, unassigned = scar_burden_ml(labels, segments, HEART.affine)
    voxel_ml = 8.0 * 1.5 * 1.2 / 1000
    expected = np.zeros(17)
    expected[3], expected[16] = (segments == 4).sum() * voxel_ml, 5 * voxel_ml
    np.testing.assert_allclose(burden, expected)
    assert unassigned == pytest.approx(3 * voxel_ml)
    whole = wall_volume_ml(segments, HEART.affine)
    assert whole.sum() == pytest.approx(HEART.wall.sum() * voxel_ml)
    assert whole[3] == pytest.approx(expected[3])
    with pytest.raises(ShapeError, match="one shape"):
        scar_burden_ml(labels[1:], segments, HEART.affine)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtra, match=r"dividing a heart into segments needs scipy.*trifuse\[med\]"):
        divide()
