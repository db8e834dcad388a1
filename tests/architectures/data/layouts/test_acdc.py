"""ACDC: phases from Info.cfg, patients that never straddle a split, and slices that others prepared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refused_cohort import refused

from trifuse.architectures.data.layouts.check import check_folder
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.layouts.split import split_patients
from trifuse.architectures.data.volumes.nifti import new_volume, write_image, write_labels
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.kernels import DataError

AFFINE = np.diag([-1.5, -1.5, 10.0, 1.0])


def put_patient(root, name, phases=(1, 12), info="ED: {}\nES: {}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\n"):
    """Write a patient's folder in the raw layout."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "Info.cfg").write_text(info.format(*phases))
    for frame in phases:
        rng = np.random.default_rng([frame, *name.encode()])
        image = new_volume(rng.integers(0, 500, (9, 8, 3)).astype(np.int16), AFFINE)
        stem = f"{name}_frame{frame:02d}"
        write_image(folder / f"{stem}.nii.gz", image.voxels, like=image)
        labels = np.resize(np.arange(4, dtype=np.uint8), image.voxels.shape)
        write_labels(folder / f"{stem}_gt.nii.gz", labels, like=image)
    (folder / f"{name}_4d.nii.gz").write_bytes(b"never opened")


def put_slices(folder, names, shape=(7, 6)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        rng = np.random.default_rng(list(name.encode()))
        np.savez(folder / f"{name}.npz", img=rng.random(shape), label=rng.integers(0, 4, shape))


# ------------------------------------------------------------------------------------------------- raw


@pytest.mark.parametrize("above", ["training", ""])
def test_both_phases_of_every_patient(tmp_path, above):
    for name in ("patient001", "patient002"):
        put_patient(tmp_path / above, name)
    (tmp_path / above / "lists").mkdir()
    cohort = open_cohort(tmp_path)
    assert (cohort.layout, cohort.class_names) == ("acdc", ("background", "RV", "MYO", "LV"))
    assert [(case.case_id, case.patient) for case in cohort.cases] == [
        (f"patient{patient}_frame{frame}", f"patient{patient}") for patient in ("001", "002") for frame in ("01", "12")
    ]
    image, labels = load_case(cohort, cohort.cases[0])
    assert (image.spacing_mm, cohort.has_spacing) == ((10, 1.5, 1.5), True)
    assert set(np.unique(labels.voxels)) == {0, 1, 2, 3}
    assert not check_folder(tmp_path).errors


@pytest.mark.parametrize(("frames", "expected"), [("ed", "p_frame07"), ("es", "p_frame03")])
def test_one_phase(tmp_path, frames, expected):
    put_patient(tmp_path, "p", phases=(7, 3))
    assert [case.case_id for case in open_cohort(tmp_path, frames=frames).cases] == [expected]


def test_targets_among_the_labels(tmp_path):
    put_patient(tmp_path, "p")
    cohort = open_cohort(tmp_path, targets={"heart": [2, 3]})
    _, labels = load_case(cohort, cohort.cases[0])
    np.testing.assert_array_equal(labels.voxels, np.resize([0, 0, 1, 1], labels.voxels.shape))


@settings(max_examples=30)
@given(patients=st.integers(3, 40), seed=st.integers(0, 9))
def test_ed_and_es_never_straddle_a_split(tmp_path_factory, patients, seed):
    root = tmp_path_factory.mktemp("acdc")
    for number in range(patients):
        folder = root / f"patient{number:03d}"
        folder.mkdir()
        (folder / "Info.cfg").write_text("ED: 1\nES: 9\n")
        for stem in ("frame01", "frame01_gt", "frame09", "frame09_gt"):
            (folder / f"{folder.name}_{stem}.nii.gz").touch()
    cohort = open_cohort(root)
    split = split_patients(cohort, seed=seed)
    for part in (split.train, split.val, split.test):
        names = [case_id.partition("_")[0] for case_id in part]
        assert all(names.count(name) == 2 for name in names)
    assert len(split.train) + len(split.val) + len(split.test) == 2 * patients


def test_a_hundred_patients_give_the_publications_split(tmp_path):
    for number in range(1, 101):
        folder = tmp_path / f"patient{number:03d}"
        folder.mkdir()
        (folder / "Info.cfg").write_text("ED: 1\nES: 9\n")
        for stem in ("frame01", "frame01_gt", "frame09", "frame09_gt"):
            (folder / f"{folder.name}_{stem}.nii.gz").touch()
    recipe = DataRecipe(str(tmp_path))
    split = recipe.choose_split(recipe.open())
    assert (len(split.train), len(split.val), len(split.test)) == (140, 20, 40)


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ("Group: DCM\n", ["ED: nothing, ES: nothing"]),
        ("ED: 1\nGroup: DCM\n", ["ED: 1, ES: nothing"]),
        ("ED: 1\nES: late\n", ["ES: late"]),
        ("ED: 0\nES: 9\n", ["counted from 1", "ED: 0"]),
        ("", ["ED: nothing"]),
    ],
)
def test_d33_info_without_phases(tmp_path, info, words):
    put_patient(tmp_path, "patient007", info=info)
    put_patient(tmp_path, "patient008")
    refused(tmp_path, "Info.cfg", "phases of patient patient007", *words)
    (error,) = check_folder(tmp_path).errors
    assert "patient007" in str(error), "the other patients are looked at all the same"


def test_d33_every_patient_is_named(tmp_path):
    for name in ("a", "b"):
        put_patient(tmp_path, name, info="x")
    refused(tmp_path, "phases of patient a", "phases of patient b")


def test_d1_missing_frames_are_all_listed(tmp_path):
    put_patient(tmp_path, "p")
    for name in ("p_frame01_gt", "p_frame12"):
        (tmp_path / "p" / f"{name}.nii.gz").unlink()
    absent = [
        f"{tmp_path}/p/p_frame01_gt.nii.gz: label of case p_frame01",
        f"{tmp_path}/p/p_frame12.nii.gz: image of case p_frame12",
    ]
    refused(tmp_path, "2 problems", *absent)


def test_d31_info_that_cannot_be_read(tmp_path):
    put_patient(tmp_path, "p")
    (tmp_path / "p" / "Info.cfg").unlink()
    (tmp_path / "p" / "Info.cfg").mkdir()
    refused(tmp_path, "Is a directory", "patient p")


# --------------------------------------------------------------------------------------------- prepared


@pytest.fixture
def prepared(tmp_path):
    slices = [f"case_001_slice{phase}_{number}" for phase in ("ED", "ES") for number in range(11)]
    put_slices(tmp_path / "train", [*slices, *(f"patient002_frame01_slice_{number}" for number in range(3))])
    put_slices(tmp_path / "valid", ["case_003_sliceED_0"])
    put_slices(tmp_path / "test", ["case_004_volume_ED", "case_004_volume_ES", "other"], (4, 7, 6))
    return tmp_path


def test_slices_of_a_phase_are_a_case_and_phases_share_their_patient(prepared):
    cohort = open_cohort(prepared)
    assert (cohort.layout, cohort.has_spacing) == ("acdc_slices", False)
    assert cohort.class_names == ("background", "RV", "MYO", "LV")
    assert {case.case_id: case.patient for case in cohort.cases} == {
        "case_001_ED": "case_001",
        "case_001_ES": "case_001",
        "case_003_ED": "case_003",
        "case_004_ED": "case_004",
        "case_004_ES": "case_004",
        "other": "other",
        "patient002_frame01": "patient002",
    }
    assert cohort.split.train == ("case_001_ED", "case_001_ES", "patient002_frame01")
    assert (cohort.split.val, cohort.split.test) == (("case_003_ED",), ("case_004_ED", "case_004_ES", "other"))
    assert DataRecipe().choose_split(cohort) == cohort.split
    assert not check_folder(prepared).errors


def test_slices_are_stacked_by_number_and_volumes_are_read_whole(prepared):
    cohort = open_cohort(prepared)
    image, labels = load_case(cohort, cohort.case("case_001_ES"))
    for number in (0, 2, 10):
        stored = np.load(prepared / "train" / f"case_001_sliceES_{number}.npz")
        np.testing.assert_array_equal(image.voxels[number], stored["img"].astype(np.float32))
        np.testing.assert_array_equal(labels.voxels[number], stored["label"])
    assert load_case(cohort, cohort.case("other"))[1].voxels.shape == (4, 7, 6)


def test_d28_a_patient_in_two_parts(prepared):
    put_slices(prepared / "valid", ["case_001_slice_0"])
    with pytest.raises(DataError, match="same patient in two parts"):
        DataRecipe().choose_split(open_cohort(prepared))
    (error,) = check_folder(prepared).errors
    assert "case_001_ED in train and case_001 in val" in str(error)


def test_names_that_tell_no_slice(prepared):
    put_slices(prepared / "train", ["average"])
    put_slices(prepared / "valid", ["case_003_sliceED_00"])
    refused(prepared, "2 problems", "average.npz: file name", "slice 0 of case_003_ED: expected one file")


def test_hidden_files_are_neither_slices_nor_volumes(prepared):
    cases = open_cohort(prepared).cases
    for name in ("train/._case_001_sliceED_0", "valid/._case_003_sliceED_0", "test/._other"):
        (prepared / f"{name}.npz").write_bytes(b"left by macOS")
    assert open_cohort(prepared).cases == cases


# -------------------------------------------------------------------------------------------- real data


def test_real_sunnybrook_is_read_as_it_lies(trifuse_data):
    root = trifuse_data / "sunnybrook_cine_sax"
    cohort = open_cohort(root, targets={"myocardium": 2, "lv": 3})
    assert cohort.layout == "acdc"
    assert len(cohort.cases) == 6
    assert len({case.patient for case in cohort.cases}) == 3
    for frames, has_myocardium in (("ed", True), ("es", False)):
        cohort = open_cohort(root, targets={"myocardium": 2, "lv": 3}, frames=frames)
        assert [case.patient for case in cohort.cases] == ["SC-HF-I-1", "SC-HF-I-2", "SC-HF-I-4"]
        for case in cohort.cases:
            labels = load_case(cohort, case)[1].voxels
            assert (labels == 2).any()
            assert (labels == 1).any() == has_myocardium, "no epicardium was drawn at the end of systole"
