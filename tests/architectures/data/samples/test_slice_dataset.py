"""Slices: samples keyed by numbers, and a cache that is never believed blindly."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from children import Child
from torch.utils.data import DataLoader

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.samples import case_cache, slice_dataset
from trifuse.architectures.data.samples.augmentation import FlipRotate
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.slice_dataset import SliceDataset
from trifuse.architectures.data.samples.volume_to_slices import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    network_input,
    preprocess_volume,
    resized_labels,
)
from trifuse.architectures.training.loader_workers import KeyedSamples
from trifuse.kernels.errors import DataError

S = 14
OF_S = Preprocessing(image_size=S)


# ---------------------------------------------------------------------------------------------- samples


@pytest.fixture
def cohort(tmp_path, put_case):
    """Two cases of four slices: values 1 and 2 on slice 1, value 2 alone on slice 2, nothing elsewhere."""
    labels = np.zeros((4, 7, 8), np.uint8)
    labels[1, 2:5, 2:4], labels[1:3, 2:5, 4:6] = 1, 2
    for name in "ab":
        put_case(name, labels=labels)
    return open_cohort(tmp_path, targets={"one": 1})


IDS = ("a", "b")


def same(first, second):
    return all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in ("image", "target"))


def test_samples(cohort):
    samples = SliceDataset(cohort, IDS, OF_S)
    assert len(samples) == 8
    for index in range(8):
        sample = samples[index]
        case_id, position = IDS[index // 4], index % 4
        image, labels = load_case(cohort, cohort.case(case_id))
        assert (sample["case_id"], sample["slice"], sample["index"]) == (case_id, position, index)
        assert (sample["image"].dtype, sample["target"].dtype) == (torch.float32, torch.int64)
        assert torch.equal(sample["image"], preprocess_volume(image, OF_S)[position])
        assert np.array_equal(sample["target"], resized_labels(labels.voxels, (S, S))[position])


def test_order_of_the_cases_is_the_order_asked_for(cohort):
    assert [SliceDataset(cohort, IDS[::-1], OF_S)[index]["case_id"] for index in (0, 7)] == ["b", "a"]


@pytest.mark.parametrize(("slices", "positions"), [("all", [0, 1, 2, 3]), ("foreground", [1]), ("labelled", [1, 2])])
def test_which_slices_are_kept(cohort, slices, positions):
    samples = SliceDataset(cohort, IDS, OF_S, slices=slices)
    assert [samples[index]["slice"] for index in range(len(samples))] == positions * 2


def test_a_contour_too_small_to_survive_resizing_still_counts(tmp_path, put_case):
    labels = np.zeros((4, 70, 80), np.uint8)
    labels[2, 1, 1] = 1
    put_case("a", labels=labels, shape=(80, 70, 4))
    samples = SliceDataset(open_cohort(tmp_path), ["a"], OF_S, slices="foreground")
    assert [samples[index]["slice"] for index in range(len(samples))] == [2]
    assert samples[0]["target"].eq(0).all()


def test_d25_nothing_left(cohort):
    empty = open_cohort(cohort.root, targets={"seven": 7})
    with pytest.raises(DataError, match="none with slices='foreground'"):
        SliceDataset(empty, IDS, OF_S, slices="foreground")
    assert len(SliceDataset(empty, IDS, OF_S)) == 8


def test_d26_a_class_that_no_slice_shows(cohort):
    SliceDataset(cohort, IDS, OF_S).require_every_class()
    samples = SliceDataset(open_cohort(cohort.root, targets={"one": 1, "seven": 7, "two": 2}), IDS, OF_S)
    with pytest.raises(DataError, match="got seven on none of 8 slices of 2 cases"):
        samples.require_every_class()


def test_unknown_slices(cohort):
    with pytest.raises(ValueError, match="expected one of 'all', 'foreground', 'labelled', got 'some'"):
        SliceDataset(cohort, IDS, OF_S, slices="some")


def test_all_unusable_cases_are_named(tmp_path, put_case):
    for name in "abc":
        put_case(name)
    (tmp_path / "images/a.nii.gz").write_bytes(b"")
    cohort = open_cohort(tmp_path)
    (tmp_path / "labels/c.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        SliceDataset(cohort, ["a", "b", "c", "d"], OF_S)
    for word in ("3 problems", "images/a.nii.gz", "labels/c.nii.gz", "got 'd'"):
        assert word in str(caught.value)


def test_labels_are_needed(tmp_path, put_case):
    put_case("a", labels=None)
    with pytest.raises(DataError, match=r"images/a\.nii\.gz: label: expected a label map to train on"):
        SliceDataset(open_cohort(tmp_path), ["a"], OF_S)


# --------------------------------------------------------------------------------- augmentation and keys


def test_the_key_decides_the_augmentation(cohort):
    samples = SliceDataset(cohort, IDS, OF_S, augment=FlipRotate())
    plain = SliceDataset(cohort, IDS, OF_S)
    assert same(samples[1], plain[1]), "an index alone asks for the slice as it is"
    torch.manual_seed(0)
    first = [samples[(7, epoch, 1)] for epoch in range(20)]
    torch.manual_seed(1)
    again = [samples[(7, epoch, 1)] for epoch in range(20)]
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    assert len({sample["image"].numpy().tobytes() for sample in first}) > 4
    others = [samples[(8, epoch, 1)] for epoch in range(20)]
    assert not all(same(one, other) for one, other in zip(first, others, strict=True))


def test_the_key_needs_no_augmentation(cohort):
    samples = SliceDataset(cohort, IDS, OF_S)
    assert same(samples[(1, 2, 3)], samples[3])
    assert same(samples[np.int64(3)], samples[3])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_see_the_same_samples(cohort, context):
    """Twice: what a worker leaves behind must not take the cache with it."""
    samples = SliceDataset(cohort, IDS, OF_S)
    keys = [(0, 0, index) for index in range(8)]
    for _ in range(2):
        loader = DataLoader(samples, sampler=keys, batch_size=4, num_workers=1, multiprocessing_context=context)
        images = torch.cat([batch["image"] for batch in loader])
        assert torch.equal(images, torch.stack([samples[index]["image"] for index in range(8)]))
    assert same(SliceDataset(cohort, IDS, OF_S)[2], samples[2])


def test_pickling_carries_no_voxels(cohort, tmp_path):
    samples = SliceDataset(cohort, IDS, OF_S, cache=tmp_path / "cache")
    content = pickle.dumps(samples)
    assert len(content) < 8000
    assert same(pickle.loads(content)[5], samples[5])


# ------------------------------------------------------------------------------------------------ cache


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


def test_without_a_cache_folder_nothing_stays_behind(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(case_cache.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    samples = SliceDataset(cohort, IDS, OF_S)
    assert os.listdir(tmp_path / "tmp")
    del samples
    assert not os.listdir(tmp_path / "tmp")


def test_a_second_data_set_decodes_nothing(cohort, tmp_path, monkeypatch):
    first = SliceDataset(cohort, IDS, OF_S, cache=tmp_path / "cache")
    monkeypatch.setattr(slice_dataset, "load_raw_case", lambda *args, **options: pytest.fail("decoded again"))
    again = SliceDataset(cohort, IDS, OF_S, cache=tmp_path / "cache", slices="foreground")
    assert same(again[0], first[1])


def test_d34_entries_are_named_after_all_that_they_depend_on(cohort, tmp_path, monkeypatch, put_case):
    cache = tmp_path / "cache"

    def entries_with(cohort=cohort, changed=None, **options):
        SliceDataset(cohort, ["a"], replace(OF_S, **changed or {}), cache=cache, **options)
        return len(entries(cache))

    assert entries_with() == entries_with(slices="labelled") == entries_with(augment=FlipRotate()) == 1
    assert entries_with(changed={"image_size": S + 2}) == 2
    assert entries_with(open_cohort(cohort.root, targets={"two": 2})) == 3
    assert entries_with(open_cohort(cohort.root, targets={"both": [1, 2]})) == 4
    assert entries_with(changed={"nonfinite": "zero"}) == 5
    assert entries_with(changed={"intensity": "zscore"}) == 6
    assert entries_with(changed={"intensity": "window", "window": (0, 500)}) == 7
    assert entries_with(changed={"intensity": "window", "window": (0, 501)}) == 8
    assert entries_with(changed={"resize": "cubic"}) == 9
    assert entries_with(changed={"channels": 1, "restore": "labels"}) == 9, "these come after the cache"
    assert entries_with(changed={"percentiles": (0.5, 99.5)}) == 10
    monkeypatch.setattr(slice_dataset, "_TRANSFORM_VERSION", 2)
    assert entries_with() == 11
    put_case("a", seed=99, labels=np.ones((4, 7, 8), np.uint8))
    assert entries_with() == 12


def test_d20_every_frame_has_entries_of_its_own(tmp_path, put_case):
    put_case("a")
    image = tmp_path / "images" / "a.nii.gz"
    still = nib.load(image)
    voxels = np.asarray(still.dataobj)
    nib.save(nib.Nifti1Image(np.stack([voxels[::-1], voxels], axis=-1), still.affine), image)
    with pytest.raises(DataError, match="frame=0 to frame=1"):
        SliceDataset(open_cohort(tmp_path), ["a"], OF_S)
    first, second = (
        SliceDataset(open_cohort(tmp_path, frame=n), ["a"], OF_S, cache=tmp_path / "cache") for n in (0, 1)
    )
    assert len(entries(tmp_path / "cache")) == 2
    assert first.digests != second.digests
    nib.save(nib.Nifti1Image(voxels, still.affine), image)
    expected = SliceDataset(open_cohort(tmp_path), ["a"], OF_S)
    assert same(second[1], expected[1])
    assert not same(first[1], expected[1])


def test_samples_follow_the_preparation(cohort):
    preprocessing = Preprocessing("window", (100, 900), resize="cubic", channels=1, image_size=S)
    sample = SliceDataset(cohort, IDS, preprocessing)[5]
    image, labels = load_case(cohort, cohort.case(sample["case_id"]))
    assert sample["image"].shape == (1, S, S)
    assert torch.equal(sample["image"], preprocess_volume(image, preprocessing)[sample["slice"]])
    expected = resized_labels(labels.voxels, (S, S), preprocessing)[sample["slice"]]
    np.testing.assert_array_equal(sample["target"], expected)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    ],
    ids=["empty", "header", "half", "digest", "longer", "flipped", "digest flipped"],
)
def test_d34_damaged_entries_are_rebuilt(cohort, tmp_path, damage):
    cache = tmp_path / "cache"
    expected = SliceDataset(cohort, ["a"], OF_S, cache=cache)[1]
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(content))
    assert same(SliceDataset(cohort, ["a"], OF_S, cache=cache)[1], expected)
    assert path.read_bytes() == content


def test_d31_an_entry_that_is_cut_or_vanishes_while_it_is_in_use(cohort, tmp_path):
    cache = tmp_path / "cache"
    samples = SliceDataset(cohort, ["a"], OF_S, cache=cache)
    worker, (path,) = pickle.loads(pickle.dumps(samples)), cache.iterdir()
    os.truncate(path, 100)  # what is mapped beyond that would end the process
    with pytest.raises(DataError, match=rf"{path.name}: cache entry: expected at least \d+, got 100 bytes"):
        samples[1]
    path.unlink()
    with pytest.raises(DataError, match=rf"^sample 1 of epoch 0 \(slice 1 of case a\): FileNotFound.*{path.name}"):
        KeyedSamples(worker, 0)[0, 0, 1]


def test_d34_killed_while_writing(cohort, tmp_path):
    """A process that dies before the entry has its name leaves nothing that is read, and is cleaned up after."""
    cache = tmp_path / "cache"

    def die():
        os.replace = lambda *names: os._exit(9)
        SliceDataset(cohort, IDS, OF_S, cache=cache)

    assert Child(die).wait() == 9
    (leftover,) = cache.iterdir()
    assert leftover.name.startswith(".trifuse-")
    fresh = SliceDataset(cohort, IDS, OF_S)
    assert all(same(SliceDataset(cohort, IDS, OF_S, cache=cache)[index], fresh[index]) for index in range(8))
    assert not leftover.exists()


def test_d35_two_processes_build_the_same_entries(cohort, tmp_path):
    """Both are held until both have decided to build; both end right, and one entry per case remains."""
    cache, expected = tmp_path / "cache", SliceDataset(cohort, IDS, OF_S)
    decided, build_one = multiprocessing.get_context("fork").Barrier(2), slice_dataset._build

    def held(*arguments):
        decided.wait(60)
        return build_one(*arguments)

    def build():
        slice_dataset._build = held
        built = SliceDataset(cohort, IDS, OF_S, cache=cache)
        assert all(same(built[index], expected[index]) for index in range(8))

    children = [Child(build) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert len(entries(cache)) == 2


# -------------------------------------------------------------------------------------------- real data


def test_real_slices_without_contours_are_left_out(tmp_path):
    root = os.environ.get("TRIFUSE_DATA")
    if not root:
        pytest.skip("TRIFUSE_DATA is not set")
    for truth in sorted(Path(root).glob("sunnybrook_cine_sax/SC-HF-I-[14]/*_gt.nii.gz")):
        for folder, source in (("labels", truth), ("images", truth.with_name(truth.name.replace("_gt", "")))):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / truth.name.replace("_gt", "")).symlink_to(source)
    cohort = open_cohort(tmp_path, targets={"lv": 3}, patient_pattern=r"SC-HF-I-\d")
    ids = [case.case_id for case in cohort.cases]
    everything = SliceDataset(cohort, ids, Preprocessing(image_size=112), cache=tmp_path / "cache")
    labelled = SliceDataset(cohort, ids, Preprocessing(image_size=112), cache=tmp_path / "cache", slices="labelled")
    assert len(everything) == 2 * 12 + 2 * 10
    assert 2 * 9 + 2 * 10 - 4 <= len(labelled) <= 2 * 9 + 2 * 10
    labelled.require_every_class()
    sample = labelled[(0, 0, 5)]
    unit = sample["image"] * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    assert unit.min() >= -1e-6
    assert unit.max() <= 1 + 1e-6
    torch.testing.assert_close(network_input(unit[0]), sample["image"])
