"""The Synapse package: slices grouped to cases, lists that decide, and numberings that are never mixed up."""

from __future__ import annotations

import numpy as np
import pytest
from refused_cohort import refused

from trifuse.architectures.data.layouts.check import check_folder
from trifuse.architectures.data.layouts.open_cohort import open_cohort, open_images
from trifuse.architectures.data.layouts.read_case import load_case, load_image
from trifuse.architectures.data.layouts.split import verify_split
from trifuse.architectures.data.layouts.synapse import SYNAPSE_ORGANS
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.slice_dataset import SliceDataset
from trifuse.architectures.data.volumes.nifti import read_labels, write_labels
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.kernels import DataError

# The table of the publication, by organ: raw BTCV, TransUNet's nine classes, MERIT's nine classes.
NUMBERINGS = {
    "aorta": (8, 1, 8),
    "gallbladder": (4, 2, 4),
    "left kidney": (3, 3, 3),
    "right kidney": (2, 4, 2),
    "liver": (6, 5, 6),
    "pancreas": (11, 6, 5),
    "spleen": (1, 7, 1),
    "stomach": (7, 8, 7),
}
SPACES = ("btcv14", "transunet9", "merit9")


def test_slices_are_cases_and_lists_split_them(tmp_path, put_synapse):
    written = put_synapse()
    cohort = open_cohort(tmp_path, label_space="transunet9")
    assert (cohort.layout, cohort.has_spacing) == ("synapse", False)
    assert cohort.class_names == ("background", *SYNAPSE_ORGANS)
    assert [case.case_id for case in cohort.cases] == ["case0005", "case0008", "case0010"]
    assert (cohort.split.train, cohort.split.val, cohort.split.test) == (("case0005", "case0010"), (), ("case0008",))
    for case in cohort.cases:
        image, labels = load_case(cohort, case)
        assert image.voxels.shape == (3, 12, 9)
        np.testing.assert_array_equal(labels.voxels, written[case.case_id])
    assert [path.name[-7:] for path in cohort.cases[0].files] == ["000.npz", "001.npz", "002.npz"]


def test_ten_slices_in_the_order_of_their_numbers(tmp_path, put_synapse):
    written = put_synapse(train=["a"], test=[], shape=(12, 4, 5))
    for path in (tmp_path / "train_npz").iterdir():
        path.rename(path.with_name(f"a_slice{int(path.stem[-3:])}.npz"))
    (tmp_path / "lists_Synapse" / "train.txt").unlink()
    cohort = open_cohort(tmp_path, label_space="transunet9")
    np.testing.assert_array_equal(load_case(cohort, cohort.cases[0])[1].voxels, written["a"])


# --------------------------------------------------------------------------------------------- label spaces


@pytest.mark.parametrize("number", range(3), ids=SPACES)
def test_every_organ_has_its_class_whatever_the_numbering(tmp_path, put_synapse, number):
    values = range(14 if number == 0 else 9)
    raw = put_synapse(train=["a"], test=["b"], values=values)
    cohort = open_cohort(tmp_path, label_space=SPACES[number])
    for case in cohort.cases:
        labels = load_case(cohort, case)[1].voxels
        for name, value in NUMBERINGS.items():
            np.testing.assert_array_equal(labels == cohort.class_names.index(name), raw[case.case_id] == value[number])
        known = [value[number] for value in NUMBERINGS.values()]
        np.testing.assert_array_equal(labels == 0, ~np.isin(raw[case.case_id], known))


def test_label_space_has_no_default(tmp_path, put_synapse):
    put_synapse()
    refused(tmp_path, "label_space: expected one of btcv14, transunet9, merit9, got none", "1 spleen, 2 right kidney")
    refused(tmp_path, "label_space: expected one of btcv14", "got synapse", label_space="synapse")


@pytest.mark.parametrize(("space", "values"), [("btcv14", 9), ("transunet9", 14), ("merit9", 14)])
def test_label_remap_refuses_the_wrong_label_space(tmp_path, put_synapse, space, values):
    """The raw remap would delete class 5 of data that were remapped before; its largest label tells them apart."""
    put_synapse(values=range(values))
    cohort = open_cohort(tmp_path, label_space=space)
    want = "9 to 13" if space == "btcv14" else "0 to 8"
    with pytest.raises(DataError, match=f"a largest label of {want}, got largest label {values - 1}.*label_space"):
        load_case(cohort, cohort.cases[0])
    assert len(check_folder(tmp_path, label_space=space).errors) == 3
    with pytest.raises(DataError, match="largest label"):
        SliceDataset(cohort, cohort.split.train, Preprocessing(image_size=14))


def test_d17_values_beyond_all_numberings(tmp_path, put_synapse):
    put_synapse(values=(0, 13, 255))
    for space in SPACES:
        cohort = open_cohort(tmp_path, label_space=space)
        with pytest.raises(DataError, match="got largest label 255"):
            load_case(cohort, cohort.cases[0])
    put_synapse(values=(-1, 0, 8))
    cohort = open_cohort(tmp_path, label_space="merit9")
    with pytest.raises(DataError, match=r"value -1 in .* voxels"):
        load_case(cohort, cohort.cases[0])


def test_numberings_with_the_same_values_are_doubted_by_the_size_of_organs(tmp_path, put_synapse):
    """Class 5 is the liver in one and the pancreas in the other, and no pancreas is larger than its liver."""
    put_synapse(values=(0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 6, 7, 8))
    assert check_folder(tmp_path, label_space="transunet9").warnings == ()
    (warning,) = check_folder(tmp_path, label_space="merit9").warnings
    assert "the pancreas has " in warning
    assert "another label_space?" in warning


def test_options_of_other_layouts_are_refused(tmp_path, put_synapse, put_case):
    put_synapse()
    refused(tmp_path, "targets: expected none", "fixed", label_space="merit9", targets={"liver": 5})
    refused(tmp_path, "frames: expected none: it belongs to the acdc layout", label_space="merit9", frames="ed")
    put_case("a", root=tmp_path / "plain")
    refused(tmp_path / "plain", "label_space: expected none", "this is plain", label_space="merit9")


# --------------------------------------------------------------------------------------- lists and names


def test_lists_decide(tmp_path, put_synapse):
    put_synapse(train=["a", "b"], test=["c", "d"])
    (tmp_path / "lists_Synapse" / "test_vol.txt").write_text("\n d \n\n")
    (tmp_path / "lists_Synapse" / "train.txt").write_text("a_slice001\na_slice000\n")
    cohort = open_cohort(tmp_path, label_space="transunet9")
    assert (cohort.split.train, cohort.split.test) == (("a",), ("d",))
    assert [path.stem for path in cohort.case("a").files] == ["a_slice000", "a_slice001"]


def test_without_lists_all_files_count(tmp_path, put_synapse):
    put_synapse()
    for name in ("train", "test_vol"):
        (tmp_path / "lists_Synapse" / f"{name}.txt").unlink()
    cohort = open_cohort(tmp_path, label_space="transunet9")
    assert (cohort.split.train, cohort.split.test) == (("case0005", "case0010"), ("case0008",))


def test_everything_that_is_wrong_with_the_names(tmp_path, put_synapse):
    put_synapse(train=["a", "b"], test=["a"])
    lists, slices = tmp_path / "lists_Synapse", tmp_path / "train_npz"
    (lists / "train.txt").write_text((lists / "train.txt").read_text() + "z_slice000\na_slice001\nodd\n")
    (slices / "odd.npz").write_bytes(b"")
    (lists / "test_vol.txt").write_text("a\ny\n")
    words = ["train.txt: names: expected a file train_npz/<name>.npz, got no file for z_slice000"]
    words += ["train.txt: names: expected each name once, got a_slice001 more than once"]
    words += ["test_vol.txt: names: expected a file test_vol_h5/<name>.npy.h5, got no file for y"]
    words += ["odd.npz: file name: expected <case>_slice<number>.npz", "case names", "a and a", "5 problems"]
    refused(tmp_path, *words, label_space="transunet9")


def test_two_files_of_one_slice_and_gaps(tmp_path, put_synapse):
    put_synapse(train=["a"], test=[])
    (tmp_path / "lists_Synapse" / "train.txt").unlink()
    slices = tmp_path / "train_npz"
    (slices / "a_slice001.npz").rename(slices / "a_slice003.npz")
    (warning,) = [text for text in check_folder(tmp_path, label_space="transunet9").warnings if "slice" in text]
    assert "a: between slices 0 and 3 there is no slice 1" in warning
    (slices / "a_slice2.npz").write_bytes((slices / "a_slice002.npz").read_bytes())
    refused(tmp_path, "slice 2 of a: expected one file, got a_slice002.npz and a_slice2.npz", label_space="merit9")


def test_l8_nothing_there(tmp_path):
    (tmp_path / "train_npz").mkdir()
    refused(tmp_path, "0 cases", "train_npz/*_slice<number>.npz", label_space="merit9")


def test_d1_a_slice_that_disappears(tmp_path, put_synapse):
    put_synapse()
    cohort = open_cohort(tmp_path, label_space="transunet9")
    cohort.cases[0].files[1].unlink()
    with pytest.raises(DataError, match=r"case0005_slice001\.npz"):
        load_case(cohort, cohort.cases[0])
    with pytest.raises(DataError, match=r"case0005_slice001\.npz"):
        SliceDataset(cohort, ["case0005"], Preprocessing(image_size=14))


# --------------------------------------------------------------------------------------------------- use


def test_recipe_takes_the_split_of_the_cohort_unless_told(tmp_path, put_synapse):
    put_synapse(train=["a", "b", "c"], test=["d"])
    recipe = DataRecipe(str(tmp_path), label_space="transunet9")
    cohort = recipe.open()
    assert recipe.choose_split(cohort) == cohort.split
    split = DataRecipe(str(tmp_path), label_space="transunet9", val_cases=("b",)).choose_split(cohort)
    assert (split.train, split.val, split.test) == (("a", "c"), ("b",), ("d",))
    split = DataRecipe(str(tmp_path), label_space="transunet9", test_cases=("a",)).choose_split(cohort)
    assert (split.train, split.val, split.test) == (("b", "c", "d"), (), ("a",))
    split = DataRecipe(str(tmp_path), label_space="transunet9", val_patients=2).choose_split(cohort)
    assert (len(split.train), len(split.val), split.test) == (1, 2, ("d",))
    assert sorted((*split.train, *split.val)) == ["a", "b", "c"]


def test_patients_to_validate_are_at_least_one():
    with pytest.raises(ValueError, match="val_patients must be at least 1, or None for none, got 0"):
        DataRecipe(val_patients=0)


def test_d28_the_same_slices_in_two_parts(tmp_path, put_synapse):
    """A single slice may well be equal, of nothing but air: a case leaks if all of it does."""
    put_synapse(train=["a", "b"], test=[])
    cohort = open_cohort(tmp_path, label_space="transunet9")
    split = DataRecipe(split_seed=0, test_cases=("b",)).choose_split(cohort)
    first, second = cohort.cases
    second.files[0].write_bytes(first.files[0].read_bytes())
    verify_split(cohort, split)
    for source, target in zip(first.files, second.files, strict=True):
        target.write_bytes(source.read_bytes())
    with pytest.raises(DataError, match="same image in two parts"):
        verify_split(cohort, split)


def test_d6_digests_cover_every_slice(tmp_path, put_synapse):
    put_synapse(root=tmp_path / "cohort")
    manifest = tmp_path / "digests.json"
    assert not check_folder(tmp_path / "cohort", label_space="transunet9", digests=manifest).errors
    path = tmp_path / "cohort" / "train_npz" / "case0010_slice002.npz"
    np.savez(path, **{"image": np.zeros((12, 9)), "label": np.zeros((12, 9))})
    (error,) = check_folder(tmp_path / "cohort", label_space="transunet9", digests=manifest).errors
    assert "case0010_slice002.npz: digest" in str(error)


def test_slices_of_a_changed_file_are_made_again(tmp_path, put_synapse):
    put_synapse(root=tmp_path / "cohort")
    cohort = open_cohort(tmp_path / "cohort", label_space="transunet9")
    cache = tmp_path / "cache"
    before = SliceDataset(cohort, ["case0005"], Preprocessing(image_size=14), cache=cache)[2]["image"]
    np.savez(cohort.cases[0].files[2], image=np.eye(12, 9), label=np.ones((12, 9)))
    assert not SliceDataset(cohort, ["case0005"], Preprocessing(image_size=14), cache=cache)[2]["image"].equal(before)


def test_images_need_no_label_space_and_predictions_fit_them(tmp_path, put_synapse):
    written = put_synapse()
    images = open_images(tmp_path)
    assert not images.has_spacing
    cohort = open_cohort(tmp_path, label_space="transunet9")
    for case in images.cases:
        assert case.label is None
        labels = written[case.case_id].astype(np.uint8)
        write_labels(tmp_path / f"{case.case_id}.nii.gz", labels, like=load_image(case))
        truth = load_case(cohort, cohort.case(case.case_id))[1]
        read = read_labels(tmp_path / f"{case.case_id}.nii.gz", like=truth)
        np.testing.assert_array_equal(read.voxels, truth.voxels)
