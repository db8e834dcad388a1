"""Four digits at the end of an image's name: the number of a channel, wherever the image lies."""

from __future__ import annotations

import json
from functools import partial

import pytest
from refused_cohort import refused_by

from trifuse.architectures.data.layouts.open_cohort import open_cohort, open_images


def put(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.nii.gz").touch()
    return folder


def opened(folder, **options):
    return {case.case_id: case.image.name.removesuffix(".nii.gz") for case in open_images(folder, **options).cases}


def refused(folder, *words, **options):
    refused_by(partial(open_images, folder, **options), *words)


@pytest.mark.parametrize("folder", ["imagesTs", "scans", "cohort/images"])
def test_d37_the_first_channel_is_no_part_of_a_cases_name(tmp_path, folder):
    put(tmp_path / folder, "a_0000", "b_0000", "c", "d_0007", "0000")
    root = tmp_path / folder.removesuffix("/images")
    assert opened(root) == {"a": "a_0000", "b": "b_0000", "c": "c", "d_0007": "d_0007", "0000": "0000"}


def test_d37_an_image_alone_has_the_name_that_it_has_in_its_folder(tmp_path):
    put(tmp_path, "a_0000", "b_0001")
    assert opened(tmp_path / "a_0000.nii.gz") == {"a": "a_0000"}
    assert opened(tmp_path / "b_0001.nii.gz") == {"b_0001": "b_0001"}


def test_d37_numbers_of_cases_stay_parts_of_their_names(tmp_path):
    assert opened(put(tmp_path, "la_0001", "la_0002")) == {"la_0001": "la_0001", "la_0002": "la_0002"}


@pytest.mark.parametrize("folder", ["imagesTs", "cohort/images"])
def test_d37_two_channels_are_not_two_cases(tmp_path, folder):
    put(tmp_path / folder, "a_0000", "a_0001", "b_0000", "b_0001")
    root = tmp_path / folder.removesuffix("/images")
    refused(root, "channels of case b", "channels of case a: expected one, got a_0000, a_0001", "rename them")


def test_d37_a_run_chooses_its_channel(tmp_path):
    folder = put(tmp_path / "imagesTs", "a_0000", "a_0001")
    assert opened(folder, channel="1") == {"a": "a_0001"}
    assert opened(folder, channel="0") == {"a": "a_0000"}
    refused(folder, "channels of case a: expected a_0002, as was trained on", channel="2")
    refused(folder, "channel: expected a dataset.json that names it, got T2", channel="T2")
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps({**description, "numTraining": 0, "file_ending": ".nii.gz"}))
    assert opened(folder, channel="T2") == {"a": "a_0001"}
    refused(folder, "channel: expected one of T1, T2, 0, 1, got FLAIR", channel="FLAIR")


def test_d37_the_first_channel_is_not_taken_for_another_that_was_trained_on(tmp_path):
    refused(put(tmp_path, "a_0000"), "expected a_0001, as was trained on, got a_0000", channel="1")


def test_d37_a_name_with_and_without_a_channel_is_one_name(tmp_path):
    refused(put(tmp_path, "a_0000", "a"), "case names", "a and a")


def test_labels_decide_what_is_a_cases_name(tmp_path):
    put(tmp_path / "images", "a_0000", "a_0001", "b_0000")
    put(tmp_path / "labels", "a_0000", "a_0001", "b")
    assert [case.case_id for case in open_cohort(tmp_path).cases] == ["a_0000", "a_0001", "b"]
