"""Finding cases, whatever their layout: names, patients, targets, and what is missing."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
from refused_cohort import refused

from trifuse.architectures.data.layouts.open_cohort import open_cohort, open_images
from trifuse.architectures.data.layouts.read_case import load_case, load_raw_case
from trifuse.architectures.data.phantoms.abdomen import write_abdomen_phantom
from trifuse.kernels.errors import DataError

# ----------------------------------------------------------------------------------------- targets, names


@pytest.mark.parametrize("name", ["mean of classes", "smoothed", "a_smoothed"])
def test_classes_are_not_called_like_columns_of_scores(tmp_path, put_case, name):
    put_case("plain", "a")
    with pytest.raises(DataError, match=f"class names: .* got {name}"):
        open_cohort(tmp_path, targets={"a": 1, name: 2})
    assert open_cohort(tmp_path, targets={"a": 1, "smoothed wall": 2}).class_names[2] == "smoothed wall"


@pytest.mark.parametrize("targets", [3, {"cavity": 3}, {"cavity": [3]}])
def test_one_target_among_several_values(tmp_path, put_case, targets):
    stored = np.arange(8 * 7 * 4, dtype=np.uint8).reshape(4, 7, 8) % 5
    put_case("a", labels=stored)
    cohort = open_cohort(tmp_path, targets=targets)
    assert cohort.class_names == ("background", "target" if targets == 3 else "cavity")
    np.testing.assert_array_equal(load_case(cohort, cohort.cases[0])[1].voxels, stored == 3)
    np.testing.assert_array_equal(load_raw_case(cohort.cases[0])[1].voxels, stored)


def test_several_targets(tmp_path, put_case):
    stored = np.arange(8 * 7 * 4, dtype=np.int16).reshape(4, 7, 8) % 5 - 1
    put_case("a", labels=stored)
    cohort = open_cohort(tmp_path, targets={"wall": [1, 3], "other": -1})
    assert cohort.class_names == ("background", "wall", "other")
    expected = np.select([(stored == 1) | (stored == 3), stored == -1], [1, 2])
    np.testing.assert_array_equal(load_case(cohort, cohort.cases[0])[1].voxels, expected)


@pytest.mark.parametrize("targets", [["1", "3"], ["lv=1", "lv=3"], ["target=1", "3"]])
def test_no_target_is_dropped_for_another_of_its_name(tmp_path, put_case, targets):
    put_case("a")
    refused(tmp_path, "twice", "one target of each name", targets=targets)
    one = open_cohort(tmp_path, targets=["1,3"])
    assert (one.class_names, one.label_map) == (("background", "target"), {1: 1, 3: 1})


@pytest.mark.parametrize("targets", [0, {}, {"a": 0}, {"a": 1, "b": [2, 1]}, {"a": []}, {"background": 1, "a": 2}])
def test_targets_that_make_no_sense(tmp_path, put_case, targets):
    put_case("a")
    refused(tmp_path, "targets", targets=targets)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0, 255), ["value 255 in 24 voxels", "--target class255=255"]),
        ((0, -1), ["value -1 in 24 voxels"]),
        ((0, 1, 2), ["value 1 in 12 voxels", "value 2 in 12 voxels", "--target class2=2"]),
    ],
)
def test_d17_values_without_meaning(tmp_path, put_case, values, words):
    stored = np.zeros((4, 7, 8), np.int16)
    stored[1:3, 2:5, 2:6] = np.resize(values[1:], 4)
    put_case("a", labels=stored)
    cohort = open_cohort(tmp_path)
    with pytest.raises(DataError) as caught:
        load_case(cohort, cohort.cases[0])
    for word in (str(cohort.cases[0].label), "expected 0 and 1", *words):
        assert word in str(caught.value)


def test_d15_d16_pairs_that_do_not_fit(tmp_path, put_case):
    put_case("a")
    put_case("b", affine=np.diag([-1.0, -1.0, 6.0, 1.0]))
    put_case("c", shape=(8, 7, 5))
    labels = tmp_path / "labels"
    for name, word in (("b", "affine"), ("c", "shape")):
        (labels / "a.nii.gz").write_bytes((labels / f"{name}.nii.gz").read_bytes())
        cohort = open_cohort(tmp_path)
        with pytest.raises(DataError, match=f"labels/a.nii.gz: {word}.*images/a.nii.gz"):
            load_case(cohort, cohort.case("a"))


def test_d27_names(tmp_path, put_case):
    """Spaces, umlauts and dots are fine; names that a file system may take for one are not."""
    for name in ("Fall 1", "Müller.x", "漢字"):
        put_case(name)
    assert [case.case_id for case in open_cohort(tmp_path).cases] == ["Fall 1", "Müller.x", "漢字"]
    put_case("fall 1")
    put_case("Mu\u0308ller.x")
    refused(tmp_path, "3 problems", "Fall 1 and fall 1", "images: name 'Müller.x'", "labels: name 'Müller.x'")


def test_d27_duplicates(tmp_path, put_case):
    put_case("a")
    put_case("a", suffix=".nii")
    refused(tmp_path, "images: name 'a'", "labels: name 'a'", "a.nii and a.nii.gz")


# ----------------------------------------------------------------------------------- images to segment


def test_images_of_a_file_a_folder_or_a_cohort(tmp_path, put_case, lascarqs):
    for name in ("a10", "a9"):
        put_case(name)
    folder = tmp_path / "images"
    for path, expected in (
        (folder / "a10.nii.gz", ["a10"]),
        (folder, ["a9", "a10"]),
        (tmp_path, ["a9", "a10"]),
        (lascarqs, [f"train_{number}" for number in range(1, 12)]),
    ):
        cohort = open_images(path)
        assert [case.case_id for case in cohort.cases] == expected
        assert all(case.label is None and case.image.is_file() for case in cohort.cases)


def test_images_need_no_labels(tmp_path, put_case):
    put_case("a")
    (tmp_path / "labels/a.nii.gz").unlink()
    assert len(open_images(tmp_path).cases) == 1


def test_no_images(tmp_path, put_case):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"notes\.txt: file name"):
        open_images(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="nothing there"):
        open_images(tmp_path / "absent")
    with pytest.raises(DataError, match="layout"):
        open_images(tmp_path)
    put_case("a")
    put_case("a", suffix=".nii")
    with pytest.raises(DataError, match=r"a\.nii and a\.nii\.gz"):
        open_images(tmp_path / "images")


# ------------------------------------------------------------------------------------- folders, patients


def test_l8_no_case_says_the_pattern(tmp_path):
    refused(tmp_path / "absent", "nothing there")
    refused(tmp_path, "it holds nothing", "images/*.nii.gz", "train_<n>/enhanced.nii.gz")
    (tmp_path / "scans").mkdir()
    refused(tmp_path, "it holds scans")
    refused(tmp_path, "0 cases", "train_<n>/enhanced.nii.gz", layout="lascarqs")
    refused(tmp_path, "0 cases", "images/*.nii.gz", layout="plain")
    (tmp_path / "images").mkdir()
    refused(tmp_path, "0 cases", "images/*.nii.gz")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "a file")


def test_unknown_layout(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of 'auto', 'lge_ecg', 'nnunet', .*, got 'bids'"):
        open_cohort(tmp_path, layout="bids")


@pytest.mark.parametrize("pattern", [r"p(\d+)_frame", r"p\d+"])
def test_patients_by_pattern(tmp_path, put_case, pattern):
    for name in ("p1_frame07", "p1_frame20", "p2_frame07"):
        put_case(name)
    patients = [case.patient for case in open_cohort(tmp_path, patient_pattern=pattern).cases]
    assert patients[0] == patients[1] != patients[2]


def test_d20_a_frame_is_of_every_image_and_not_of_arrays(tmp_path, put_case):
    for name in "ab":
        put_case(name)
    assert {case.frame for case in open_cohort(tmp_path).cases} == {None}
    for cohort in (
        open_cohort(tmp_path, frame=2),
        open_images(tmp_path, frame=2),
        open_images(tmp_path / "images", frame=2),
    ):
        assert {case.frame for case in cohort.cases} == {2}
    write_abdomen_phantom(tmp_path / "abdomen", cases=3, size=(16, 16, 2))
    for opened in (open_cohort, open_images):
        with pytest.raises(DataError, match="frame: expected none: arrays of this layout"):
            opened(tmp_path / "abdomen", label_space="transunet9", frame=0)


def test_patient_pattern_must_match_every_case(tmp_path, put_case):
    for name in ("p1", "q1", "q2"):
        put_case(name)
    refused(tmp_path, "2 problems", "q1: patient", "q2: patient", patient_pattern=r"p\d")
    refused(tmp_path, "regular expression", patient_pattern="(")


def test_unknown_case(tmp_path, put_case):
    put_case("a")
    with pytest.raises(DataError, match=re.escape("case: expected one of 'a', got 'b'")):
        open_cohort(tmp_path).case("b")


# -------------------------------------------------------------------------------------------- real data


def arrange_sunnybrook(root: Path, target: Path) -> None:
    """Link the Sunnybrook frames that have contours into a plain cohort."""
    for folder in ("images", "labels"):
        (target / folder).mkdir(parents=True)
    for truth in sorted(root.glob("sunnybrook_cine_sax/*/*_gt.nii.gz")):
        name = truth.name.replace("_gt", "")
        (target / "labels" / name).symlink_to(truth)
        (target / "images" / name).symlink_to(truth.with_name(name))


def test_real_cohort(tmp_path):
    if not os.environ.get("TRIFUSE_DATA"):
        pytest.skip("TRIFUSE_DATA is not set")
    arrange_sunnybrook(Path(os.environ["TRIFUSE_DATA"]), tmp_path)
    cohort = open_cohort(tmp_path, targets={"lv": 3}, patient_pattern=r"SC-HF-I-\d+")
    assert len(cohort.cases) == 6
    assert len({case.patient for case in cohort.cases}) == 3
    views = []
    for case in cohort.cases:
        image, labels = load_case(cohort, case)
        _, raw = load_raw_case(case)
        assert image.voxels.shape[1:] == (256, 256)
        assert image.spacing_mm[0] > 7
        np.testing.assert_array_equal(labels.voxels, raw.voxels == 3)
        drawn = raw.voxels.any(axis=(1, 2))
        assert drawn.any()
        if "I-4" not in case.case_id:
            assert not drawn.all()
        directions = image.geometry.display_affine[:3, :3]
        views.append(directions / np.linalg.norm(directions, axis=0))
    for first, second in itertools.combinations(views, 2):
        assert (np.einsum("ac,ac->c", first, second) > 0.6).all(), "cases are shown from different sides"
