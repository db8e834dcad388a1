"""Patches: drawn by numbers alone, case first, with a share on the foreground; and patches that cover slices once."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.samples import resampled_cases
from trifuse.architectures.data.samples.nnunet_augmentation import NnUNetAugmentation
from trifuse.architectures.data.samples.patch_dataset import (
    IGNORED,
    GridPatches,
    PatchDataset,
    median_spacing_mm,
    window_starts,
)
from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.data.samples.resampling import PlaneGrid
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.data.volumes.nifti import read_image, write_image
from trifuse.kernels import DataError

P = 8
PATCHES = Patches(spacing_mm=(1.0, 1.0), samples_per_epoch=10)
AS_IS = Preprocessing("as_is", channels=1)
SHAPE = (5, 21, 17)  # slices, rows, columns


@pytest.fixture
def put_numbered(tmp_path, put_case):
    """Return a function that writes a case whose value tells a voxel's place, and opens the cohort of all of them."""

    def put(name="a", shape=SHAPE, label_at=((3, 4, 5),), empty=0, affine=None):
        voxels = np.arange(1, np.prod(shape) + 1).reshape(shape).astype(np.float32)
        voxels[:empty] = 0
        labels = np.zeros(shape, np.uint8)
        for value, place in enumerate(label_at, start=1):
            labels[place] = value
        affine = np.diag([-1.0, -1.0, 20.0, 1.0]) if affine is None else affine
        put_case(name, labels=labels, shape=shape[::-1], affine=affine)
        path = tmp_path / "images" / f"{name}.nii.gz"
        write_image(path, voxels, like=read_image(path))
        targets = {f"class{value}": value for value in range(1, max(2, len(label_at) + 1))}
        return open_cohort(tmp_path, targets=targets)

    return put


def patches_of(cohort, ids=("a",), size=P, patches=PATCHES, preprocessing=AS_IS, **options):
    return PatchDataset(cohort, ids, replace(preprocessing, image_size=size, patches=patches), **options)


def keys(count, epoch=0):
    return [(3, epoch, index) for index in range(count)]


def corner_of(sample, shape=SHAPE):
    """Return slice, row and column of a patch's first pixel, as its value tells."""
    return np.unravel_index(int(sample["image"][0, 0, 0]) - 1, shape)


# ------------------------------------------------------------------------------------------------- samples


def test_a_patch_is_a_square_of_a_slice_with_its_labels(put_numbered):
    cohort = put_numbered()
    samples = patches_of(cohort)
    image, labels = load_case(cohort, cohort.case("a"))
    corners = set()
    for key in keys(60):
        sample = samples[key]
        place, row, column = corner_of(sample)
        window = (place, slice(row, row + P), slice(column, column + P))
        np.testing.assert_array_equal(sample["image"][0], image.voxels[window])
        np.testing.assert_array_equal(sample["target"], labels.voxels[window])
        assert (sample["image"].dtype, sample["target"].dtype) == (torch.float32, torch.int64)
        assert (sample["case_id"], sample["slice"], sample["index"]) == ("a", place, key[2])
        corners.add((row, column))
    assert len(samples) == 10
    assert samples.len_slices == SHAPE[0]
    rows, columns = map(set, zip(*corners, strict=True))
    assert min(rows) >= 0
    assert max(rows) <= SHAPE[1] - P
    assert len(rows) > 8, "and anywhere in between"
    assert len(columns) > 6


def test_every_place_on_a_slice_can_be_drawn(put_numbered):
    anywhere = Patches((1.0, 1.0), foreground=0.0)
    samples = patches_of(put_numbered(shape=(2, P + 2, P + 1), label_at=()), patches=anywhere)
    found = {tuple(map(int, corner_of(samples[key], (2, P + 2, P + 1)))) for key in keys(150)}
    assert found == {(place, row, column) for place in range(2) for row in range(3) for column in range(2)}


def test_the_key_alone_decides(put_numbered):
    """T1: what was drawn before, here or elsewhere, changes nothing."""
    cohort = put_numbered()
    samples = patches_of(cohort, augment=NnUNetAugmentation())
    torch.manual_seed(0)
    first = [samples[key] for key in keys(12)]
    torch.manual_seed(1)
    again = [patches_of(cohort, augment=NnUNetAugmentation())[key] for key in reversed(keys(12))][::-1]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["target"], other["target"])
    other_epoch = [samples[key] for key in keys(12, epoch=1)]
    assert any(not torch.equal(a["image"], b["image"]) for a, b in zip(first, other_epoch, strict=True))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_see_the_same_samples(put_numbered, context):
    samples = patches_of(
        put_numbered(), side_inputs={"a": SideInputs(np.ones(SHAPE, np.uint8), {"days": torch.tensor(4.0)})}
    )
    loader = DataLoader(samples, sampler=keys(6), batch_size=3, num_workers=1, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(torch.cat([b["image"] for b in batches]), torch.stack([samples[k]["image"] for k in keys(6)]))
    assert batches[0]["prior"].shape == (3, 17, P, P)
    assert torch.equal(batches[0]["days"], torch.full((3,), 4.0))


def test_pickling_carries_no_voxels(put_numbered, tmp_path):
    assert len(pickle.dumps(patches_of(put_numbered(), cache=tmp_path / "cache"))) < 8000


def test_small_slices_lie_in_the_middle_of_zeros(put_numbered):
    shape = (3, 5, P + 3)
    cohort = put_numbered(shape=shape, label_at=((1, 2, 2),))
    image, _ = load_case(cohort, cohort.case("a"))
    prior = {"a": SideInputs(np.full(shape, 3, np.uint8))}
    for key in keys(30):
        sample = patches_of(cohort, side_inputs=prior)[key]
        inside = sample["image"][0, 2:7]
        column = int(inside[0, 0] - 1) % shape[2]
        np.testing.assert_array_equal(inside, image.voxels[sample["slice"], :, column : column + P])
        for name in ("image", "prior"):
            assert not sample[name][:, :2].any()
            assert not sample[name][:, 7:].any()
        assert sample["prior"][2, 2:7].all()
        assert not sample["target"][:2].any()


# ------------------------------------------------------------------------------------------- where it is drawn


@pytest.mark.parametrize("foreground", [0.0, 1 / 3, 1.0])
def test_share_of_patches_on_the_foreground(put_numbered, foreground):
    """One labelled pixel in 40 x 40, which a patch drawn anywhere shows in 64 of 33 x 33 places on one slice of 4."""
    cohort = put_numbered(shape=(4, 40, 40), label_at=((2, 20, 20),))
    samples = patches_of(cohort, patches=Patches((1.0, 1.0), foreground=foreground))
    count = 400
    shows = sum(int(samples[key]["target"].any()) for key in keys(count))
    centred = sum(int(samples[key]["target"][P // 2, P // 2] == 1) for key in keys(count))
    share = foreground + (1 - foreground) * 64 / 33**2 / 4
    assert abs(shows - count * share) <= 3.5 * np.sqrt(count * share * (1 - share))
    assert centred >= count * foreground - 3.5 * np.sqrt(count * foreground * (1 - foreground))


def test_classes_are_as_often_in_the_centre_however_large(put_numbered, tmp_path):
    cohort = put_numbered(shape=(4, 40, 40), label_at=((slice(0, 4), slice(5, 30), slice(5, 30)), (1, 20, 20)))
    samples = patches_of(cohort, patches=Patches((1.0, 1.0), foreground=1.0))
    centres = [int(samples[key]["target"][P // 2, P // 2]) for key in keys(300)]
    assert set(centres) == {1, 2}
    assert abs(centres.count(2) - 150) < 3.5 * np.sqrt(300 / 4)


def test_a_foreground_at_the_edge_shifts_the_patch_inside(put_numbered):
    cohort = put_numbered(label_at=((3, 0, 16),))
    samples = patches_of(cohort, patches=Patches((1.0, 1.0), foreground=1.0))
    for key in keys(5):
        assert tuple(map(int, corner_of(samples[key]))) == (3, 0, SHAPE[2] - P)
        assert samples[key]["target"][0, P - 1] == 1


def test_cases_are_drawn_before_slices(put_numbered):
    put_numbered("many", shape=(20, 12, 12))
    cohort = put_numbered("few", shape=(2, 12, 12), label_at=((1, 4, 4),))
    samples = patches_of(cohort, ("many", "few"))
    few = sum(samples[key]["case_id"] == "few" for key in keys(300))
    assert abs(few - 150) < 3.5 * np.sqrt(300 / 4)


@pytest.mark.parametrize(("slices", "shown"), [("all", {0, 1, 2, 3, 4}), ("foreground", {3}), ("labelled", {1, 3})])
def test_which_slices_are_kept(put_numbered, tmp_path, slices, shown):
    put_numbered(label_at=((3, 4, 5), (1, 4, 5)))
    put_numbered("b", label_at=())
    cohort = open_cohort(tmp_path, targets={"one": 1})
    samples = patches_of(cohort, ("a", "b") if slices == "all" else ("b", "a"), slices=slices)
    assert {samples[key]["slice"] for key in keys(80)} == shown
    assert {samples[key]["case_id"] for key in keys(80)} == ({"a", "b"} if slices == "all" else {"a"})
    covering = GridPatches(cohort, ("a",), replace(AS_IS, image_size=32, patches=PATCHES), slices=slices)
    assert [covering[index]["slice"] for index in range(len(covering))] == sorted(shown)


def test_no_slice_left(put_numbered):
    cohort = put_numbered(label_at=())
    with pytest.raises(DataError, match="none with slices='foreground'"):
        patches_of(open_cohort(cohort.root), slices="foreground")


def test_d26_a_class_that_no_slice_shows(put_numbered, tmp_path):
    cohort = put_numbered()
    patches_of(cohort).require_every_class()
    with pytest.raises(DataError, match="got seven on none of 5 slices of 1 cases"):
        patches_of(open_cohort(tmp_path, targets={"one": 1, "seven": 7})).require_every_class()


def test_samples_say_how_their_image_was_moved_where_it_is_asked_for(put_numbered):
    cohort, asked = put_numbered(), {"a": SideInputs(transform=True)}
    upright = torch.eye(2, 3)
    still = [patches_of(cohort, side_inputs=asked)[key]["transform"] for key in keys(3)]
    still.append(
        GridPatches(cohort, ["a"], replace(AS_IS, image_size=P, patches=PATCHES), side_inputs=asked)[0]["transform"]
    )
    assert all(torch.equal(matrix, upright) for matrix in still)
    mirrored = NnUNetAugmentation(rotation_probability=0.0, scale_probability=0.0, mirror_probability=1.0)
    moved = patches_of(cohort, side_inputs=asked, augment=mirrored)[keys(1)[0]]["transform"]
    assert torch.equal(moved, -upright)
    assert "transform" not in patches_of(cohort, side_inputs={"a": SideInputs()}, augment=mirrored)[keys(1)[0]]


# ------------------------------------------------------------------------- resampling, crop, prior, and the cache


def test_slices_are_cropped_resampled_and_counted_as_in_the_volume(put_numbered):
    affine = np.diag([-1.0, -2.0, 20.0, 1.0])
    cohort = put_numbered(empty=2, affine=affine, label_at=((slice(2, 5), slice(4, 9), slice(3, 9)),))
    image, labels = load_case(cohort, cohort.case("a"))
    segments = np.random.default_rng(0).integers(0, 18, SHAPE).astype(np.uint8)
    constants = {"ecg": torch.randn(12, 6), "has_ecg": torch.tensor(True)}
    zscore = Preprocessing("zscore", channels=1)
    patches = Patches(spacing_mm=(1.5, 1.5))
    samples = patches_of(
        cohort, size=40, patches=patches, preprocessing=zscore, side_inputs={"a": SideInputs(segments, constants)}
    )
    grid = PlaneGrid.of(image, (1.5, 1.5))
    assert grid.size == (28, 11)
    wanted = grid.image(image.voxels, zscore), grid.labels(labels.voxels), grid.nearest(segments)
    inside = slice(6, 34), slice(15, 26)
    for key in keys(8):
        sample = samples[key]
        scaled, target, prior = (planes[sample["slice"] - 2] for planes in wanted)
        np.testing.assert_array_equal(sample["image"][0][inside], scaled)
        np.testing.assert_array_equal(sample["target"][inside], target)
        np.testing.assert_array_equal(sample["prior"][:, *inside], prior == np.arange(1, 18)[:, None, None])
        assert sample["prior"].dtype == torch.float32
        assert all(torch.equal(sample[name], value) for name, value in constants.items())
    assert {samples[key]["slice"] for key in keys(30)} == {2, 3, 4}


def test_three_channels_for_encoders_that_want_them(put_numbered):
    sample = patches_of(put_numbered(), preprocessing=Preprocessing())[(0, 0, 0)]
    assert sample["image"].shape == (3, P, P)


def test_extras_that_a_case_lacks(put_numbered):
    put_numbered("b")
    with pytest.raises(DataError, match="b: side_inputs"):
        patches_of(put_numbered(), ("a", "b"), side_inputs={"a": SideInputs()})


def test_d34_a_second_data_set_decodes_nothing_and_entries_depend_on_the_transform(put_numbered, tmp_path, monkeypatch):
    cohort, cache = put_numbered(), tmp_path / "cache"
    first = patches_of(cohort, cache=cache)
    patches_of(cohort, cache=cache, patches=Patches((1.5, 1.0)))
    patches_of(cohort, cache=cache, preprocessing=Preprocessing("zscore", channels=1))
    assert len(list(cache.iterdir())) == 3
    patches_of(cohort, cache=cache, preprocessing=Preprocessing("zscore", channels=1, percentiles=(1, 90)))
    assert len(list(cache.iterdir())) == 4
    with monkeypatch.context() as patch:
        patch.setattr(resampled_cases, "_TRANSFORM_VERSION", resampled_cases._TRANSFORM_VERSION + 1)
        patches_of(cohort, cache=cache)
    assert len(list(cache.iterdir())) == 5
    patches_of(cohort, cache=cache, preprocessing=replace(AS_IS, nonfinite="zero"))
    assert len(list(cache.iterdir())) == 6
    monkeypatch.setattr(resampled_cases, "load_raw_case", lambda *args, **options: pytest.fail("decoded again"))
    again = patches_of(cohort, cache=cache, size=P + 2, side_inputs={"a": SideInputs(np.ones(SHAPE, np.uint8))})
    assert again[(0, 0, 0)]["prior"].shape == (17, P + 2, P + 2)
    GridPatches(cohort, ["a"], replace(AS_IS, image_size=P, patches=PATCHES), cache=cache)
    assert torch.equal(patches_of(cohort, cache=cache)[(0, 0, 0)]["image"], first[(0, 0, 0)]["image"])


def test_median_spacing_of_the_cases_that_can_be_read(put_numbered, tmp_path):
    for name, step in (("a", 1.0), ("b", 1.5), ("c", 4.0), ("d", 9.0)):
        cohort = put_numbered(name, affine=np.diag([-step, -2 * step, 20.0, 1.0]))
    assert median_spacing_mm(cohort, ["a", "b", "c"]) == (3.0, 1.5)
    (tmp_path / "images/d.nii.gz").write_bytes(b"")
    assert median_spacing_mm(cohort, ["a", "b", "c", "d"]) == (3.0, 1.5)
    with pytest.raises(DataError, match=r"images/d\.nii\.gz"):
        patches_of(cohort, ["d"], patches=Patches(median_spacing_mm(cohort, ["d"])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing_mm": (0.0, 1.0)}, "patches.spacing_mm must be two lengths of 0.001 to 1000 mm"),
        ({"spacing_mm": (1.0, float("nan"))}, "patches.spacing_mm"),
        ({"step": 0.0}, r"patches.step must be in \(0, 1\], got 0.0"),
        ({"step": 1.1}, "patches.step"),
        ({"foreground": 1.1}, "patches.foreground must be in"),
        ({"samples_per_epoch": 0}, "patches.samples_per_epoch must be at least 1, got 0"),
    ],
)
def test_patches_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Patches(**options)


def test_a_spacing_is_needed(put_numbered):
    for patches, got in ((Patches(), "None"), (None, "whole slices")):
        with pytest.raises(ValueError, match=f"got {got}; median_spacing_mm finds them"):
            patches_of(put_numbered(), patches=patches)


# --------------------------------------------------------------------------------------------- covering patches


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_windows_cover_an_axis_evenly(length, side, step):
    starts = window_starts(length, side, step)
    if length <= side:
        (start,) = starts
        assert 0 <= side - length + 2 * start + 1 <= 1, "in the middle"
        return
    assert (starts[0], starts[-1]) == (0, length - side)
    gaps = np.diff(starts)
    assert (gaps >= 0).all()
    assert gaps.max() <= np.ceil(side * step)
    assert gaps.max() - gaps.min() <= 1
    assert len(starts) == 1 + int(np.ceil((length - side) / (side * step)))


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 8, 8), (2, 9, 17), (1, 23, 40)])
def test_every_pixel_is_answered_for_once(put_numbered, shape):
    cohort = put_numbered(shape=shape, label_at=((0, slice(1, 4), slice(2, 5)),))
    image, labels = load_case(cohort, cohort.case("a"))
    prior = np.random.default_rng(0).integers(0, 18, shape).astype(np.uint8)
    covering = GridPatches(
        cohort, ["a"], replace(AS_IS, image_size=P, patches=PATCHES), side_inputs={"a": SideInputs(prior)}
    )
    found: dict[int, list[int]] = {}
    for index in range(len(covering)):
        sample = covering[index]
        assert sample["index"] == index
        own = sample["target"] != IGNORED
        assert own.any()
        answered = (sample["image"][0][own], sample["target"][own], sample["prior"][:, own].argmax(0) + 1)
        has_prior = sample["prior"][:, own].any(0)
        for value, label, segment, has in zip(*answered, has_prior, strict=True):
            found.setdefault(int(value), []).append((int(label), int(segment * has)))
    voxels = zip(image.voxels.flat, labels.voxels.flat, prior.flat, strict=True)
    assert found == {int(value): [(int(label), int(segment))] for value, label, segment in voxels}
