"""The layout of LAScarQS: order, labels, and every file that is missing."""

from __future__ import annotations

import numpy as np
from refused_cohort import refused

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom

TINY = (24, 24, 6)


def test_lascarqs_in_numeric_order(lascarqs):
    cohort = open_cohort(lascarqs)
    assert cohort.layout == "lascarqs"
    assert cohort.class_names == ("background", "left atrium")
    assert [case.case_id for case in cohort.cases] == [f"train_{number}" for number in range(1, 12)]
    assert [case.patient for case in cohort.cases] == [case.case_id for case in cohort.cases]


def test_lascarqs_root_may_be_the_folder_itself(lascarqs):
    assert open_cohort(lascarqs / "train_data").cases == open_cohort(lascarqs).cases


def test_lascarqs_labels_are_binarised(lascarqs, tmp_path):
    """Some releases store 420: anything above 0 is atrium."""
    import nibabel as nib

    case = open_cohort(lascarqs).cases[0]
    folder = tmp_path / "train_data" / "train_1"
    folder.mkdir(parents=True)
    (folder / "enhanced.nii.gz").write_bytes(case.image.read_bytes())
    stored = nib.load(case.label)
    values = np.asarray(stored.dataobj).astype(np.int16) * 420
    nib.Nifti1Image(values, stored.affine).to_filename(folder / "atriumSegImgMO.nii.gz")
    cohort = open_cohort(tmp_path)
    _, labels = load_case(cohort, cohort.cases[0])
    assert labels.voxels.dtype == np.uint8
    np.testing.assert_array_equal(labels.voxels, load_case(open_cohort(lascarqs), case)[1].voxels)
    assert set(np.unique(labels.voxels)) == {0, 1}


def test_d1_every_missing_file_is_listed(tmp_path):
    write_left_atrium_phantom(tmp_path, cases=3, size=TINY)
    first = tmp_path / "train_data/train_1/enhanced.nii.gz"
    second = tmp_path / "train_data/train_3/atriumSegImgMO.nii.gz"
    first.unlink()
    second.unlink()
    second.mkdir()
    refused(tmp_path, "2 problems", str(first), "case train_1", str(second), "case train_3", "a folder")


def test_lascarqs_has_no_targets(lascarqs):
    refused(lascarqs, "targets", targets=3)
