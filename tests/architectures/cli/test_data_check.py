"""``trifuse data check``: everything that is wrong with a cohort, warnings, intervals, and ECGs."""

from __future__ import annotations

import re
import shutil

import nibabel
import numpy as np
import pytest
from command import run_main

from trifuse.architectures.data.volumes.nifti import read_labels, write_labels
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.kernels import DataError


def test_data_check_lists_everything_and_fails(atria, tmp_path, capsys):
    folder = shutil.copytree(atria, tmp_path / "cohort")
    assert run_main(["data", "check", folder], capsys)[0] == 0
    (folder / "train_data/train_1/enhanced.nii.gz").write_bytes(b"")
    (folder / "train_data/train_2/atriumSegImgMO.nii.gz").unlink()
    code, output, _ = run_main(["data", "check", folder], capsys)
    assert code == 3
    assert "train_1/enhanced.nii.gz: content: expected a gzip file, by its name, got an empty file" in output
    assert "train_2/atriumSegImgMO.nii.gz" in output


@pytest.mark.parametrize("fault", ["empty mask", "qform"])
def test_d12_d25_strict_check_counts_warnings(atria, tmp_path, capsys, fault):
    words = ["data", "check", shutil.copytree(atria, tmp_path / "cohort")]
    assert run_main([*words, "--strict"], capsys)[0] == 0
    folder = tmp_path / "cohort/train_data/train_1"
    if fault == "qform":
        image = nibabel.load(folder / "enhanced.nii.gz")
        image.set_qform(image.affine + np.diag([0, 0, 1, 0]), 1)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header), folder / "enhanced.nii.gz")
    else:
        truth = read_labels(folder / "atriumSegImgMO.nii.gz")
        write_labels(folder / "atriumSegImgMO.nii.gz", truth.voxels * 0, like=truth)
    code, output, _ = run_main(words, capsys)
    assert code == 0
    assert re.search(f"warning: .*{fault}", output)
    assert run_main([*words, "--strict"], capsys)[0] == 3


def test_e9_intervals_are_checked_and_may_be_allowed(scar_cohort, tmp_path, capsys):
    words = ["data", "check", scar_cohort, "--max-interval", 30]
    code, output, _ = run_main(words, capsys)
    assert code == 3
    assert "[0, 30] days" in output
    for value in ("nan", "inf", "-1"):
        code, _, errors = run_main([*words[:-1], value], capsys)
        assert code == 3
        assert f"expected a number of days, 0 or more, got {float(value)}" in errors
    assert run_main(["data", "check", scar_cohort], capsys)[0] == 0
    recipe = DataRecipe(root=str(scar_cohort), max_interval_days=30.0)
    with pytest.raises(DataError, match=r"\[0, 30\] days"):
        recipe.open()


def test_e6_every_ecg_of_a_folder_is_looked_at(scar_cohort, tmp_path, capsys):
    folder = shutil.copytree(scar_cohort / "ecg", tmp_path / "ecg")
    code, output, _ = run_main(["data", "check-ecg", folder], capsys)
    assert code in (0, 3)
    (folder / "broken.npy").write_bytes(b"no array")
    code, output, _ = run_main(["data", "check-ecg", folder], capsys)
    assert code == 3
    assert "broken.npy: error: " in output
