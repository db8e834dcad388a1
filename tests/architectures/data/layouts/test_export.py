"""Cohorts written in another layout: the same cases, classes and grids come back, or nothing is written at all."""

from __future__ import annotations

import json
import sys

import h5py
import numpy as np
import pytest

from trifuse.architectures.data.layouts.check import check_folder
from trifuse.architectures.data.layouts.cohort import Split
from trifuse.architectures.data.layouts.export import write_nnunet, write_synapse
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.layouts.synapse import SYNAPSE_ORGANS
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.slice_dataset import SliceDataset
from trifuse.kernels import DataError, MissingExtra

SPLIT = Split(("a",), ("b",), ("c",))


@pytest.fixture
def cohort(tmp_path, put_case):
    """Three cases on an oblique grid, whose labels 2 and 7 are the pancreas and the left kidney."""
    affine = np.diag([-1.0, 1.5, 4.0, 1.0])
    cosine, sine = np.cos(0.2), np.sin(0.2)
    affine[:2, :2] = np.array([[cosine, -sine], [sine, cosine]]) @ affine[:2, :2]
    affine[:3, 3] = 5, -3, 20
    for name in "abc":
        labels = np.random.default_rng(0).choice(np.array([0, 2, 7], np.uint8), (4, 7, 8))
        put_case(name, labels=labels, affine=affine, root=tmp_path / "plain")
    return open_cohort(tmp_path / "plain", targets={"Pancreas": 2, "kidney_left": 7})


def refused(write, *words):
    with pytest.raises(DataError) as caught:
        write()
    for word in words:
        assert word in str(caught.value), str(caught.value)


# ----------------------------------------------------------------------------------------------- nnU-Net


def test_nnunet_round_trip(cohort, tmp_path):
    root = write_nnunet(cohort, tmp_path / "out" / "Dataset001", SPLIT, channel_name="CT")
    described = json.loads((root / "dataset.json").read_text())
    assert described == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "Pancreas": 1, "kidney_left": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    findings = check_folder(root)
    assert (findings.errors, findings.warnings) == ((), ())
    again = findings.cohort
    assert again.class_names == cohort.class_names
    assert (again.split.train, again.split.test) == (("a", "b"), ("c",))
    for case in cohort.cases:
        for before, after in zip(load_case(cohort, case), load_case(again, again.case(case.case_id)), strict=True):
            np.testing.assert_array_equal(before.voxels, after.voxels)
            np.testing.assert_array_equal(before.geometry.affine, after.geometry.affine)
            assert before.spacing_mm == after.spacing_mm


def test_nnunet_without_a_split_has_no_test_cases(cohort, tmp_path):
    root = write_nnunet(cohort, tmp_path / "out")
    assert sorted(path.name for path in root.iterdir()) == ["dataset.json", "imagesTr", "labelsTr"]
    assert open_cohort(root).split is None


@pytest.mark.parametrize("scale", [1, 0.5, 1e6])
def test_nnunet_keeps_every_value(tmp_path, put_case, scale):
    """Whole numbers of 16 bits are stored as such, others as float32."""
    from trifuse.architectures.data.volumes.nifti import read_image, write_image

    put_case("a", root=tmp_path / "plain")
    path = tmp_path / "plain" / "images" / "a.nii.gz"
    image = read_image(path)
    write_image(path, image.voxels * np.float32(scale), like=image)
    root = write_nnunet(open_cohort(tmp_path / "plain"), tmp_path / "out")
    written = root / "imagesTr" / "a_0000.nii.gz"
    np.testing.assert_array_equal(read_image(written).voxels, read_image(path).voxels)


# ----------------------------------------------------------------------------------------------- Synapse


def test_synapse_round_trip(cohort, tmp_path):
    root = write_synapse(cohort, tmp_path / "out", SPLIT, window=(100, 900))
    findings = check_folder(root, label_space="transunet9")
    assert not [error for error in findings.errors if "class" not in str(error)], "only two organs are there"
    again = findings.cohort
    assert (again.split.train, again.split.test) == (("a", "b"), ("c",))
    for case in cohort.cases:
        image, labels = load_case(cohort, case)
        packed, organs = load_case(again, again.case(case.case_id))
        np.testing.assert_allclose(packed.voxels, (np.clip(image.voxels, 100, 900) - 100) / 800, atol=1e-6)
        for name, old in (("pancreas", 1), ("left kidney", 2)):
            new = again.class_names.index(name)
            np.testing.assert_array_equal(organs.voxels == new, labels.voxels == old)


def test_synapse_files_are_those_that_others_read(cohort, tmp_path):
    """Names, keys, types and ranges as TransUNet's loader expects them."""
    root = write_synapse(cohort, tmp_path / "out", SPLIT, window=(100, 900))
    names = (root / "lists_Synapse" / "train.txt").read_text().split()
    assert names == [f"{case}_slice{number:03d}" for case in "ab" for number in range(4)]
    assert (root / "lists_Synapse" / "test_vol.txt").read_text() == "c\n"
    for name in names:
        stored = np.load(root / "train_npz" / f"{name}.npz")
        assert (stored["image"].shape, stored["image"].dtype, stored["label"].shape) == ((7, 8), np.float32, (7, 8))
    with h5py.File(root / "test_vol_h5" / "c.npy.h5") as stored:
        assert (stored["image"].shape, stored["label"].shape) == ((4, 7, 8), (4, 7, 8))
        assert (stored["image"][()].min(), stored["image"][()].max()) == (0, 1)
        assert set(np.unique(stored["label"])) == {0, 3, 6}


def test_synapse_to_synapse_changes_nothing(tmp_path, put_synapse):
    put_synapse(root=tmp_path / "cohort")
    cohort = open_cohort(tmp_path / "cohort", label_space="transunet9")
    again = open_cohort(write_synapse(cohort, tmp_path / "out", window=None), label_space="transunet9")
    assert again.split == cohort.split
    for case in cohort.cases:
        first, second = load_case(cohort, case), load_case(again, again.case(case.case_id))
        np.testing.assert_array_equal(first[1].voxels, second[1].voxels)
        low, high = first[0].voxels.min(), first[0].voxels.max()
        np.testing.assert_allclose((first[0].voxels - low) / (high - low), second[0].voxels, atol=1e-6)


def test_d23_synapse_without_contrast(cohort, tmp_path):
    root = write_synapse(cohort, tmp_path / "out", window=(5000, 6000))
    assert not np.load(root / "train_npz" / "a_slice000.npz")["image"].any()


def test_classes_that_are_no_organs(cohort, tmp_path):
    other = open_cohort(cohort.root, targets={"pancreas": 2, "LV": 7})
    refused(lambda: write_synapse(other, tmp_path / "out"), "classes: expected some of aorta, ", "got 'LV'", "targets")
    assert not (tmp_path / "out").exists()


def test_l6_synapse_without_h5py(cohort, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtra, match=r"writing test volumes needs h5py"):
        write_synapse(cohort, tmp_path / "out", SPLIT)


# ------------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("write", [write_nnunet, write_synapse])
def test_l4_folders_that_hold_something(cohort, tmp_path, write):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    refused(lambda: write(cohort, out), f"{out}: output folder: expected a new or an empty folder")
    refused(lambda: write(cohort, out / "mine.txt"), "new or an empty folder")
    assert (out / "mine.txt").read_text() == "keep"
    (out / "mine.txt").unlink()
    assert write(cohort, out) == out


@pytest.mark.parametrize("write", [write_nnunet, write_synapse])
def test_nothing_is_written_if_a_case_cannot_be_used(cohort, tmp_path, write):
    for name in "bc":
        cohort.case(name).label.write_bytes(b"")
    refused(lambda: write(cohort, tmp_path / "out"), "2 problems", "labels/b.nii.gz", "labels/c.nii.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_cases_without_labels(tmp_path, put_case):
    put_case("a", labels=None, root=tmp_path / "plain")
    cohort = open_cohort(tmp_path / "plain")
    refused(lambda: write_nnunet(cohort, tmp_path / "out"), "label: expected a label map, got none")


# -------------------------------------------------------------------------------------------- real data


def test_real_ct_through_both_layouts(trifuse_data, tmp_path):
    """One abdominal CT with 8 organs: plain files to nnU-Net's layout, that to Synapse's, and slices of it."""
    source = trifuse_data / "totalsegmentator_example_ct"
    for folder, name in (("images", "example_ct"), ("labels", "example_ct_seg8")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ct.nii.gz").symlink_to(source / f"{name}.nii.gz")
    names = json.loads((source / "labels.json").read_text())
    plain = open_cohort(tmp_path, targets={name: int(value) for value, name in names.items()})
    nnunet = open_cohort(write_nnunet(plain, tmp_path / "nnunet", channel_name="CT"))
    synapse = open_cohort(write_synapse(nnunet, tmp_path / "synapse"), label_space="transunet9")
    (image, labels), (packed, organs) = (load_case(cohort, cohort.case("ct")) for cohort in (nnunet, synapse))
    np.testing.assert_array_equal(image.voxels, load_case(plain, plain.case("ct"))[0].voxels)
    np.testing.assert_array_equal(labels.voxels, organs.voxels)
    assert organs.voxels.shape == (112, 101, 122)
    assert np.bincount(organs.voxels.ravel())[[1, 2, 6]].tolist() == [1786, 1300, 818]
    np.testing.assert_allclose(packed.voxels, (image.voxels.clip(-125, 275) + 125) / 400, atol=1e-6)
    assert synapse.class_names[1:] == SYNAPSE_ORGANS
    samples = SliceDataset(synapse, ["ct"], Preprocessing(image_size=64), slices="foreground")
    samples.require_every_class()
