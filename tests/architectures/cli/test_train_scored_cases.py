"""Cases that a run will be judged on are read before its first step, not after its last one."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest
from command import ATRIA_TRAINING

from trifuse.architectures.cli.main import main
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.evaluation.scoring import check_scorable
from trifuse.architectures.runs import pipeline
from trifuse.kernels import DataError

TEST_CASE = "train_4"  # the split of the cohort tests on it alone


@pytest.fixture
def cohort(atria, tmp_path):
    return shutil.copytree(atria, tmp_path / "cohort")


@pytest.fixture
def trained(monkeypatch):
    """Count the runs that get as far as training."""
    runs = []

    def counted(*arguments, **options):
        runs.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "fit_network", counted)
    return runs


def train(cohort, out, *words):
    split = str(cohort / "split.json")
    return main(["train", "dino_unet", str(cohort), "--out", str(out), "--split", split, *ATRIA_TRAINING, *words])


def file_of(cohort, name, case=TEST_CASE):
    return cohort / "train_data" / case / name


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def with_nan(path):
    image = nib.load(path)
    array = np.asanyarray(image.dataobj).astype(np.float32)
    array[3, 3, 1] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), path)


def with_implausible_spacing(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([1e-4, 1e-4, 1e-4, 1.0])), path)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("enhanced.nii.gz", cut, ("train_4", "enhanced.nii.gz")),
        ("atriumSegImgMO.nii.gz", cut, ("train_4", "atriumSegImgMO.nii.gz")),
        ("enhanced.nii.gz", with_nan, ("train_4", "--nonfinite")),
    ],
)
def test_a_test_case_that_cannot_be_scored_is_refused_before_training(
    cohort, tmp_path, trained, capsys, name, damage, words
):
    damage(file_of(cohort, name))
    assert train(cohort, tmp_path / "run") == 3
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == []
    assert trained == []


def test_parts_that_are_not_reported_on_need_not_be_scorable(cohort, tmp_path, trained):
    cut(file_of(cohort, "enhanced.nii.gz"))
    assert train(cohort, tmp_path / "run", "--report", "val") != 3
    assert len(trained) == 1


def test_a_run_that_has_begun_goes_on_without_reading_them_again(cohort, atria_run, tmp_path, trained):
    out = shutil.copytree(atria_run, tmp_path / "run")
    cut(file_of(cohort, "enhanced.nii.gz"))
    assert train(cohort, out, "--resume") != 3
    assert len(trained) == 1


def test_what_is_wrong_with_all_cases_is_said_at_once(cohort):
    cut(file_of(cohort, "enhanced.nii.gz", "train_1"))
    for name in ("enhanced.nii.gz", "atriumSegImgMO.nii.gz"):
        with_implausible_spacing(file_of(cohort, name, "train_2"))
    opened = open_cohort(cohort)
    with pytest.raises(DataError) as caught:
        check_scorable(opened, ("train_1", "train_2", "train_3"), "error")
    assert all(word in str(caught.value) for word in ("train_1", "train_2", "spacing"))
    assert "train_3" not in str(caught.value)


def test_no_case_to_score_is_no_fault(cohort):
    check_scorable(open_cohort(cohort), (), "error")
