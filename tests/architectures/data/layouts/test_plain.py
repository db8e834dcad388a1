"""The plain layout: images and labels paired by their names."""

from __future__ import annotations

import re

import numpy as np
import pytest
from refused_cohort import refused

from trifuse.architectures.data.layouts.open_cohort import open_cohort, open_images
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.kernels import DataError


def test_plain_pairs_by_name(tmp_path, put_case):
    truth = {name: put_case(name, suffix=suffix) for name, suffix in (("b_10", ".nii.gz"), ("b_9", ".nii"))}
    (tmp_path / "images" / "._b_9.nii").write_bytes(b"left by a file browser")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    cohort = open_cohort(tmp_path)
    assert cohort.layout == "plain"
    assert [case.case_id for case in cohort.cases] == ["b_9", "b_10"]
    for case in cohort.cases:
        image, labels = load_case(cohort, case)
        np.testing.assert_array_equal(labels.voxels, truth[case.case_id])
        assert image.voxels.shape == labels.voxels.shape


@pytest.mark.parametrize("name", ["c.nrrd", "c.mha", "c.DCM", "c.hdr", "c.h5"])
@pytest.mark.parametrize("folder", ["images", "labels"])
def test_d1_an_image_in_a_format_that_is_not_read_is_no_case_that_is_lost_unseen(tmp_path, put_case, folder, name):
    put_case("b")
    (tmp_path / folder / name).write_bytes(b"an image of another format")
    message = rf"{re.escape(name)}: file ending: .*\.nii\.gz or \.nii.*; convert it to NIfTI"
    with pytest.raises(DataError, match=message):
        open_cohort(tmp_path)
    if folder == "images":
        for given in (tmp_path, tmp_path / "images"):
            with pytest.raises(DataError, match=message):
                open_images(given)
    assert [case.case_id for case in open_images(tmp_path / "images" / "b.nii.gz").cases] == ["b"]


def test_plain_with_channel_suffix(tmp_path, put_case):
    put_case("case_1", image_name="case_1_0000")
    put_case("case_2_0000")
    assert [case.case_id for case in open_cohort(tmp_path).cases] == ["case_1", "case_2_0000"]


def test_plain_without_labels(tmp_path, put_case):
    put_case("a_0000", labels=None)
    put_case("b", labels=None)
    cohort = open_cohort(tmp_path)
    assert [(case.case_id, case.label) for case in cohort.cases] == [("a", None), ("b", None)]
    assert load_case(cohort, cohort.cases[0])[1] is None


def test_d1_unpaired_files(tmp_path, put_case):
    for name in "abc":
        put_case(name)
    (tmp_path / "labels" / "a.nii.gz").unlink()
    (tmp_path / "images" / "b.nii.gz").unlink()
    refused(tmp_path, "2 problems", "labels/a.nii.gz: label of case a", "labels/b.nii.gz", "no image of that name")
