"""The 17 segments: a partition of the wall, the same whichever way the array lies in the world, mirrored or oblique."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ring_heart import SEPTUM_OF_THE_CHEST, Heart, axes_of, ring_heart

from trifuse.architectures.taff_unet.aha17 import aha17_labels, aha17_map, sector

CHEST = axes_of(3)
SEPTAL, LATERAL = (2, 3, 8, 9, 14), (5, 6, 11, 12, 16)
REFERENCES = ("landmarks", "rv_mask", "orientation", "fixed_angle")
seeds = st.integers(0, 2**31 - 1)
spacings = st.tuples(st.floats(4, 12), st.floats(1.0, 1.9), st.floats(1.0, 1.9))


def options(heart: Heart, reference: str, screen_deg: float = 0.0) -> dict:
    more = {"landmarks": heart.landmarks(), "rv_mask": {"rv_mask": heart.rv}, "fixed_angle": {"angle_deg": screen_deg}}
    return {"reference": reference, **more.get(reference, {})}


def levels_of(segments: np.ndarray) -> list[str]:
    """The level of every slice, told by the segments in it."""
    names = {1: "basal", 7: "mid", 13: "apical", 17: "apex", 0: ""}
    return [names[max(first for first in names if first <= part.max())] for part in segments]


# ------------------------------------------------------------------------------------------- where the segments lie


@given(seed=seeds, mirrored=st.booleans(), base_first=st.booleans(), spacing=spacings)
@pytest.mark.parametrize("reference", REFERENCES)
@settings(max_examples=8)
def test_e10_segments_are_those_of_the_world(reference, seed, mirrored, base_first, spacing):
    """In oblique stacks, right- or left-handed, of either order, with oblong pixels; away from the sectors' edges."""
    screen_deg = {"orientation": None}.get(reference, seed % 360)
    axes = axes_of(seed, mirrored=mirrored)
    assume(abs(axes[:, 0] @ SEPTUM_OF_THE_CHEST) < 0.95)  # slices that face the septum have no orientation
    heart = ring_heart(axes, base_first=base_first, spacing=spacing, screen_deg=screen_deg)
    found = aha17_labels(heart.labels, heart.affine, **options(heart, reference, screen_deg))
    share = (found == heart.truth)[heart.clear].mean()
    assert share > 0.97 if reference == "rv_mask" else share == 1  # a mask is no better than its pixels
    np.testing.assert_array_equal(found > 0, heart.wall)


@given(seed=seeds, holes=st.floats(0, 0.5), base_first=st.sampled_from((None, True)), force_last=st.booleans())
def test_e10_masks_divide_the_wall_of_any_prediction(seed, holes, base_first, force_last):
    """Holes, islands, slices that are lost: whatever is divided is divided whole, each voxel into one segment."""
    rng = np.random.default_rng(seed)
    heart = ring_heart(axes_of(seed), spacing=(9.0, 2.4, 2.0), size=(28, 32))
    labels = np.where(rng.random(heart.labels.shape) < holes * rng.random(), 0, heart.labels)
    labels[rng.random(labels.shape) < 0.01] = 3
    labels[rng.integers(len(labels))] = 0
    more = {"reference": "fixed_angle", "angle_deg": 40.0, "base_first": base_first, "force_last": force_last}
    masks = aha17_map(labels, heart.affine, **more)
    assert masks.dtype == np.uint8
    assert masks.shape == (17, *labels.shape)
    np.testing.assert_array_equal(masks.sum(0), np.isin(labels, (2, 3)))
    segments = aha17_labels(labels, heart.affine, **more)
    np.testing.assert_array_equal(np.where(masks.any(0), masks.argmax(0) + 1, 0), segments)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turning_heart_and_reference_together_changes_nothing(reference, turns):
    heart = ring_heart(CHEST, screen_deg=35.0, spacing=(8.0, 1.3, 1.3))
    before = aha17_labels(heart.labels, heart.affine, **options(heart, reference, 35.0))
    middle = (np.array(heart.labels.shape[1:]) - 1) / 2
    turned_middle = middle[::-1] if turns % 2 else middle
    turn = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), turns)  # what np.rot90 does to (row, column)
    marks = {
        name: tuple(turn @ (np.array(point) - middle) + turned_middle)
        for name, point in (("rv_anterior", heart.anterior), ("rv_inferior", heart.inferior))
    }
    more = options(heart, reference, 35.0 + 90 * turns)
    more |= marks if reference == "landmarks" else {}
    more |= {"rv_mask": np.rot90(heart.rv, turns, (1, 2))} if reference == "rv_mask" else {}
    affine = heart.affine.copy()
    if reference == "orientation":  # the reference is the world, to which the affine turns
        affine[:3, 1:3] = heart.affine[:3, 1:3] @ turn.T
    turned = aha17_labels(np.rot90(heart.labels, turns, (1, 2)), affine, **more)
    np.testing.assert_array_equal(turned, np.rot90(before, turns, (1, 2)))


def test_one_slice_axis_or_another():
    heart = ring_heart(CHEST)
    expected = aha17_labels(heart.labels, heart.affine, reference="orientation")
    for axis, order in ((1, (1, 0, 2)), (2, (1, 2, 0)), (-1, (1, 2, 0))):
        affine = heart.affine[:, [*order, 3]]
        found = aha17_labels(np.moveaxis(heart.labels, 0, axis), affine, reference="orientation", slice_axis=axis)
        np.testing.assert_array_equal(np.moveaxis(found, axis, 0), expected)
        marks = heart.landmarks() | {"slice_axis": axis}
        found = aha17_labels(np.moveaxis(heart.labels, 0, axis), affine, **marks)
        assert (np.moveaxis(found, axis, 0) == heart.truth)[heart.clear].all()


def test_a_mirrored_heart_swaps_septum_and_lateral_wall_unless_the_reference_is_mirrored():
    """The columns of the array are reversed under an affine that knows nothing of it."""
    heart = ring_heart(CHEST, screen_deg=120.0)  # the septum's middle lies to the left on the screen
    width = heart.labels.shape[2]
    before = aha17_labels(heart.labels, heart.affine, **heart.landmarks())
    septal, lateral = (np.isin(before, part)[..., ::-1] & heart.clear[..., ::-1] for part in (SEPTAL, LATERAL))
    mirrored = heart.labels[..., ::-1]

    notes: list[str] = []
    marks = {
        name: (row, width - 1 - column)
        for name, (row, column) in zip(("rv_anterior", "rv_inferior"), (heart.anterior, heart.inferior), strict=True)
    }
    after = aha17_labels(mirrored, heart.affine, reference="landmarks", **marks, note=notes.append)
    np.testing.assert_array_equal(after, before[..., ::-1])
    assert any("mirrored" in note for note in notes)

    after = aha17_labels(mirrored, heart.affine, **heart.landmarks())
    assert np.isin(after[septal], LATERAL).mean() > 0.8
    assert np.isin(after[lateral], SEPTAL).mean() > 0.8


# ----------------------------------------------------------------------------------------------------- the sectors


def test_sectors_of_a_ring_are_equal():
    """Up to the pixels along their two radial edges."""
    heart = ring_heart(CHEST, spacing=(8.0, 1.0, 1.0), size=(60, 60))
    segments = aha17_labels(heart.labels, heart.affine, reference="orientation")
    for index, numbers in ((0, range(1, 7)), (3, range(7, 13)), (6, range(13, 17))):
        areas = np.array([(segments[index] == number).sum() for number in numbers])
        assert areas.min() > 0
        assert np.abs(areas - areas.mean()).max() <= 2 * 7  # two edges through a wall of seven pixels


def test_sectors_of_each_level():
    middles = {"basal": range(30, 360, 60), "mid": range(30, 360, 60), "apical": range(60, 420, 90), "apex": (0, 200)}
    expected = {"basal": [2, 3, 4, 5, 6, 1], "mid": [8, 9, 10, 11, 12, 7], "apical": [14, 15, 16, 13], "apex": [17, 17]}
    for level, angles in middles.items():
        assert sector(level, np.array(angles, float)).tolist() == expected[level]
        assert sector(level, np.array(angles, float) - 720).tolist() == expected[level]


def test_sectors_are_half_open():
    below = 1e-6
    for level, edges in (("basal", range(0, 360, 60)), ("apical", range(15, 360, 90))):
        at = sector(level, np.array(edges, float))
        assert at.tolist() == sector(level, np.array(edges) + 20.0).tolist()
        assert sector(level, np.array(edges) - below).tolist() == np.roll(at, 1).tolist()
    assert sector("basal", np.array([-1e-13, 360 - 1e-13])).tolist() == [2, 2]  # rounding moves no edge


def test_apical_sectors_are_offset_by_15_degrees():
    assert sector("apical", np.array([14.9, 15.0])).tolist() == [13, 14]
    assert sector("apical", np.array([0.0, 104.9, 105.0, 195.0, 285.0])).tolist() == [13, 14, 15, 16, 13]


def test_basal_and_apical_anterior_segments_have_one_middle():
    angles = np.arange(0, 360, 0.5) + 0.25
    for level, anterior in (("basal", 1), ("mid", 7), ("apical", 13)):
        inside = np.deg2rad(angles[sector(level, angles) == anterior])
        middle = np.rad2deg(np.arctan2(np.sin(inside).sum(), np.cos(inside).sum())) % 360
        assert middle == pytest.approx(330)


# ------------------------------------------------------------------------------------------------------ the levels


@pytest.mark.parametrize(
    ("rings", "expected"),
    [
        (1, ["mid"]),
        (2, ["basal", "apical"]),
        (3, ["basal", "mid", "apical"]),
        (4, ["basal", "mid", "mid", "apical"]),
        (5, ["basal", "basal", "mid", "apical", "apical"]),
        (6, ["basal"] * 2 + ["mid"] * 2 + ["apical"] * 2),
    ],
)
@pytest.mark.parametrize("tip", [0, 1, 2])
def test_thirds(rings, tip, expected):
    heart = ring_heart(CHEST, levels=("basal",) * rings + ("apex",) * tip)
    for labels, base_first in ((heart.labels, True), (heart.labels[::-1], False)):
        segments = aha17_labels(labels, heart.affine, reference="orientation", base_first=base_first)
        assert levels_of(segments[:: 1 if base_first else -1]) == expected + ["apex"] * tip


def test_the_apex_has_a_cavity_of_fewer_than_ten_pixels():
    heart = ring_heart(CHEST)
    for pixels, level in ((9, "apex"), (10, "apical")):
        labels = heart.labels.copy()
        tip = labels[-1].reshape(-1)
        middle = np.ravel_multi_index((24, 30), labels.shape[1:])
        tip[middle - 5 : middle - 5 + pixels] = 1
        assert levels_of(aha17_labels(labels, heart.affine, reference="orientation"))[-1] == level


def test_force_last():
    """Where no slice is the apex, the last one is, if one asks for it; a single ring is not the apex."""
    heart = ring_heart(CHEST, levels=("basal",) * 4)
    asked = {"reference": "orientation", "force_last": True}
    assert levels_of(aha17_labels(heart.labels, heart.affine, reference="orientation"))[-1] == "apical"
    assert levels_of(aha17_labels(heart.labels, heart.affine, **asked)) == ["basal", "mid", "apical", "apex"]
    assert levels_of(aha17_labels(heart.labels[:1], heart.affine, **asked)) == ["mid"]
    tipped = ring_heart(CHEST)  # one that has an apex keeps its apical slices
    expected = aha17_labels(tipped.labels, tipped.affine, reference="orientation")
    np.testing.assert_array_equal(aha17_labels(tipped.labels, tipped.affine, **asked), expected)


def test_an_open_basal_slice_is_basal_and_moves_no_third():
    heart = ring_heart(CHEST)
    labels, notes = heart.labels.copy(), []
    labels[0, :, :28] = 0
    segments = aha17_labels(labels, heart.affine, reference="orientation", base_first=True, note=notes.append)
    assert levels_of(segments) == ["basal"] * 3 + ["mid"] * 3 + ["apical"] * 2 + ["apex"]
    assert levels_of(segments)[1:] == levels_of(aha17_labels(labels[1:], heart.affine, reference="orientation"))
    assert notes == ["the wall closes from slice 1 on; what comes before, at the base, is basal"]


def test_an_open_or_empty_slice_below_the_base_moves_no_third():
    heart = ring_heart(CHEST)
    expected = aha17_labels(heart.labels, heart.affine, reference="orientation")
    labels, notes = heart.labels.copy(), []
    labels[2] = 0
    labels[5, :24] = 0
    segments = aha17_labels(labels, heart.affine, reference="orientation", base_first=True, note=notes.append)
    whole = [0, 1, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(segments[whole], expected[whole])
    assert levels_of(segments)[5] == "apical"
    assert len(notes) == 1
    assert notes[0].startswith("the wall of slice 5 covers")


def test_the_larger_cavity_is_at_the_base():
    heart = ring_heart(CHEST)
    for labels, where in ((heart.labels, "first"), (heart.labels[::-1], "last")):
        notes: list[str] = []
        segments = aha17_labels(labels, heart.affine, reference="fixed_angle", angle_deg=0.0, note=notes.append)
        assert levels_of(segments)[0 if where == "first" else -1] == "basal"
        assert notes == [f"base taken at the {where} slice, where the cavity is larger"]


@pytest.mark.parametrize("step", [1.0, -1.0])
def test_a_single_slice_lies_as_in_a_chest(step):
    """Where the cavity tells no order, the apex points to the patient's left, front and feet."""
    axes = axes_of(3)
    down = axes[:, 0] @ (-1, 1, -1) > 0
    heart = ring_heart(axes, levels=("mid",), base_first=bool(down))
    affine = heart.affine @ np.diag([step, 1, 1, 1])
    notes: list[str] = []
    found = aha17_labels(heart.labels, affine, reference="orientation", note=notes.append)
    assert (found == heart.truth)[heart.clear].all()
    assert notes[0].endswith("the cavity does not tell, the affine does")


# ----------------------------------------------------------------------------------------------------- the centres


def test_a_lost_cavity_and_an_island_move_no_segment():
    heart = ring_heart(CHEST)
    expected = aha17_labels(heart.labels, heart.affine, reference="orientation", base_first=True)
    labels = heart.labels.copy()
    labels[0][labels[0] == 1] = 0  # enclosed by the wall, it is still there
    labels[1, :4, :4] = 2
    found = aha17_labels(labels, heart.affine, reference="orientation", base_first=True)
    np.testing.assert_array_equal(found[heart.wall], expected[heart.wall])
    assert (found[1, :4, :4] > 0).all()


def test_a_basal_slice_without_cavity_is_measured_about_its_wall():
    heart = ring_heart(CHEST, spacing=(8.0, 1.0, 1.0))
    labels = heart.labels.copy()
    labels[0, 30:] = 0
    labels[0][labels[0] == 1] = 0
    found = aha17_labels(labels, heart.affine, reference="fixed_angle", angle_deg=0.0, base_first=True)
    middle = np.argwhere(labels[0] == 2).mean(0)
    offsets = np.argwhere(labels[0] == 2) - middle
    ends = np.isin(found[0][labels[0] == 2], (1, 2))  # the sectors that meet at the anterior insertion
    degrees = np.rad2deg(np.arctan2(-offsets[:, 0], offsets[:, 1]))
    np.testing.assert_array_equal(ends, (np.abs(degrees) < 60) | np.isclose(np.abs(degrees), 60) & ends)


def test_one_centre_for_all_slices():
    """A slice that lies aside is measured about its own centre, or about that of the basal and mid thirds."""
    heart = ring_heart(CHEST, spacing=(8.0, 1.0, 1.0))
    labels = heart.labels.copy()
    labels[6] = np.roll(labels[6], 5, 1)
    straight = {"reference": "fixed_angle", "angle_deg": 0.0}
    expected = aha17_labels(heart.labels, heart.affine, **straight)
    own = aha17_labels(labels, heart.affine, **straight)
    np.testing.assert_array_equal(own[6], np.roll(expected[6], 5, 1))
    common = aha17_labels(labels, heart.affine, **straight, centre="global")
    both = (labels[6] == 2) & heart.wall[6]
    np.testing.assert_array_equal(common[6][both], expected[6][both])
