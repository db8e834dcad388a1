"""Two plain folders of label maps: scored as arrays are, and refused whole where they do not fit each other."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from trifuse.architectures.data.volumes.nifti import read_labels
from trifuse.architectures.evaluation.label_folders import (
    is_label_folder,
    label_cohort,
    open_label_folders,
    score_label_folders,
)
from trifuse.architectures.evaluation.metrics import Conventions, case_metrics
from trifuse.kernels import DataError

AFFINE = np.diag([-1.25, 1.5, 8.0, 1.0])


def heart(shift: int = 0) -> np.ndarray:
    """A wall of value 2 about a pool of value 1, in the middle two of four slices."""
    labels = np.zeros((14, 12, 4), np.uint8)
    labels[3 + shift : 10 + shift, 3:9, 1:3] = 2
    labels[5 + shift : 8 + shift, 5:7, 1:3] = 1
    return labels


def put(folder: Path, name: str, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    nib.save(nib.Nifti1Image(labels, affine), path)
    return path


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Predictions and truth of three cases, the predictions a voxel off."""
    for name in ("case_2.nii.gz", "case_10.nii.gz", "other.nii.gz"):
        put(tmp_path / "labels", name, heart())
        put(tmp_path / "predictions", name, heart(1))
    return tmp_path / "predictions", tmp_path / "labels"


def opened(predictions: Path, labels: Path, *, cases=None, **options):
    cohort = label_cohort(labels)
    case_ids = [case.case_id for case in cohort.cases] if cases is None else cases
    return open_label_folders(predictions, cohort, case_ids, **options)


def refused(folders, *words, **options) -> str:
    with pytest.raises(DataError) as caught:
        opened(*folders, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


def test_every_value_is_a_class_and_scored_as_its_mask(folders):
    predictions, labels = folders
    rows = score_label_folders(opened(*folders), Conventions())
    assert [(row.case_id, row.class_name) for row in rows] == [
        (case, name) for case in ("case_2", "case_10", "other") for name in ("label 1", "label 2")
    ]
    truth = read_labels(labels / "other.nii.gz")
    found = read_labels(predictions / "other.nii.gz", like=truth)
    for value, row in enumerate(rows[-2:], start=1):
        assert row.scores == case_metrics(found.voxels == value, truth.voxels == value, (8.0, 1.5, 1.25))
    assert rows[0].scores["hd95_mm"] == pytest.approx(1.25)


def test_named_targets_join_values_and_leave_the_others_out(folders):
    rows = score_label_folders(opened(*folders, targets=["heart=1,2"]), Conventions())
    assert {row.class_name for row in rows} == {"heart"}
    assert rows[0].scores["dsc"] == pytest.approx(6 / 7)  # seven rows each, six of them shared


def test_files_of_either_suffix_pair_and_lie_on_one_grid_however_they_are_stored(folders):
    predictions, _ = folders
    turned = nib.as_closest_canonical(nib.load(predictions / "case_2.nii.gz"))
    (predictions / "case_2.nii.gz").unlink()
    nib.save(turned, predictions / "case_2.nii")
    first = score_label_folders(opened(*folders), Conventions())
    assert first[0].scores == first[2].scores


def test_patients_are_found_in_names(folders):
    cohort = label_cohort(folders[1], patient_pattern=r"^[a-z]+")
    assert {case.case_id: case.patient for case in cohort.cases} == {
        "case_2": "case",
        "case_10": "case",
        "other": "other",
    }
    with pytest.raises(DataError, match=r"case_2: patient.*no match"):
        label_cohort(folders[1], patient_pattern=r"^other")


def test_l11_names_that_do_not_pair_are_all_listed(folders):
    predictions, _ = folders
    (predictions / "other.nii.gz").rename(predictions / "othr.nii.gz")
    (predictions / "case_2.nii.gz").unlink()
    said = refused(folders, "3 problems", "othr.nii.gz: name: expected one in", "got no label map of that name")
    assert said.count("got no prediction of that name") == 2
    (predictions / "othr.nii.gz").unlink()
    rows = score_label_folders(opened(*folders, cases=["case_10"]), Conventions())
    assert {row.case_id for row in rows} == {"case_10"}


def test_d37_label_maps_in_another_format_are_not_lost(folders):
    (folders[1] / "third.nrrd").write_bytes(b"NRRD0004")
    with pytest.raises(DataError, match=r"third\.nrrd: file ending"):
        label_cohort(folders[1])
    (folders[1] / "third.nrrd").unlink()
    (folders[0] / "case_2.npz").write_bytes(b"probabilities beside the label map")
    assert len(opened(*folders).predictions) == 3


@pytest.mark.parametrize("damage", ["shape", "affine", "fraction", "truncated", "unit"])
def test_d15_d16_d18_files_that_do_not_fit_are_all_listed_before_any_score(folders, damage):
    predictions, _ = folders
    said = {"shape": "shape", "affine": "voxels away", "fraction": "integers", "truncated": "gzip", "unit": "spacing"}
    for name in ("case_2", "other"):
        path = predictions / f"{name}.nii.gz"
        if damage == "shape":
            put(predictions, path.name, heart()[:, :-1])
        elif damage == "affine":
            put(predictions, path.name, heart(), AFFINE @ np.diag([1, 1, 1.5, 1]))
        elif damage == "fraction":
            put(predictions, path.name, heart() * np.float32(0.7))
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[:-12])
        else:
            for folder in folders:
                put(folder, path.name, heart(), np.diag([-1.25e-3, 1.5e-3, 8e-3, 1.0]))
    message = refused(folders, "2 problems in the data", "case_2.nii.gz", "other.nii.gz", said[damage])
    assert "case_10" not in message
    if damage == "unit":
        assert len(opened(*folders, accept_spacing=True).predictions) == 3


def test_d17_values_that_the_truth_does_not_have_are_refused(folders):
    predictions, _ = folders
    put(predictions, "other.nii.gz", heart() * np.uint8(127))
    refused(folders, "other.nii.gz: values", "values of the truth: 0, 1, 2", "got 127, 254", "targets=NAME=VALUE")
    put(predictions, "other.nii.gz", np.where(heart() == 2, 3, heart()).astype(np.uint8))
    refused(folders, "got 3", targets=["wall=2"])
    rows = score_label_folders(opened(*folders, targets=["wall=2", "scar=3"]), Conventions())
    assert [row.scores["dsc"] for row in rows if row.case_id == "other"] == [0, 0]


def test_d26_a_target_that_nobody_drew_is_a_slip(folders):
    refused(folders, "target scar", "3 in no label map", targets=["pool=1", "scar=3"])


def test_d17_what_is_no_label_map(folders):
    _, labels = folders
    put(labels, "other.nii.gz", heart().astype(np.int16) - 1)
    refused(folders, "other.nii.gz: labels", "values from 0", "got -1")
    put(labels, "other.nii.gz", np.arange(14 * 12 * 4, dtype=np.int16).reshape(14, 12, 4))
    refused(folders, "at most 255", "are these images?")


def test_d25_folders_in_which_nothing_is_drawn(folders):
    for folder in folders:
        for path in folder.iterdir():
            put(folder, path.name, np.zeros((14, 12, 4), np.uint8))
    refused(folders, "got no value above 0", "at least one class")


def test_slices_count_as_labelled_by_all_values(folders):
    rows = score_label_folders(
        opened(*folders, targets=["pool=1"]), Conventions(aggregation="slice", slices="labelled")
    )
    assert [row.slice for row in rows if row.case_id == "other"] == [1, 2]


def test_frames_of_files_of_four_dimensions(tmp_path):
    still, cine = heart(), np.stack([heart(), heart(1)], axis=-1)
    put(tmp_path / "labels", "a.nii.gz", cine)
    put(tmp_path / "predictions", "a.nii.gz", still)
    for frame, dsc in ((0, 1.0), (1, 6 / 7)):
        cohort = label_cohort(tmp_path / "labels", frame=frame)
        folders = open_label_folders(tmp_path / "predictions", cohort, ["a"], targets=["heart=1,2"])
        (row,) = score_label_folders(folders, Conventions())
        assert row.scores["dsc"] == pytest.approx(dsc)


def test_what_is_a_folder_of_label_maps(folders, put_case, tmp_path):
    put_case("a", root=tmp_path / "cohort")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.gz").write_bytes(gzip.compress(b"notes"))
    told = {name: is_label_folder(tmp_path / name) for name in ("labels", "cohort", "empty", "text", "absent")}
    assert told == {"labels": True, "cohort": False, "empty": False, "text": False, "absent": False}
