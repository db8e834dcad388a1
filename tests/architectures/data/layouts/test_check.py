"""Checking a cohort: all errors and warnings at once."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from children import Child

from trifuse.architectures.data.layouts.check import check_cohort, check_folder
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.kernels.errors import DataError


def says(messages, *words):
    """Assert that one message holds all words."""
    texts = [str(message) for message in messages]
    assert any(all(word in text for word in words) for text in texts), texts


def test_a_sound_cohort(tmp_path, put_case):
    for name in "abc":
        put_case(name)
    findings = check_folder(tmp_path)
    assert (findings.errors, findings.warnings) == ((), ())
    assert findings.cohort == open_cohort(tmp_path)


def test_d1_d17_d25_everything_is_reported_at_once(tmp_path, put_case):
    for name in "abcdefg":
        put_case(name)
    images, labels = tmp_path / "images", tmp_path / "labels"
    (labels / "a.nii.gz").unlink()
    content = bytearray((images / "b.nii.gz").read_bytes())
    content[-5] ^= 255
    (images / "b.nii.gz").write_bytes(bytes(content))
    (images / "c.nii.gz").write_text("<html>")
    put_case("d", shape=(8, 7, 9), labels=np.zeros((9, 7, 8), np.uint8), root=tmp_path / "other")
    (labels / "d.nii.gz").write_bytes((tmp_path / "other/labels/d.nii.gz").read_bytes())
    put_case("e", labels=np.full((4, 7, 8), 255))
    put_case("f", labels=np.zeros((4, 7, 8), np.uint8))
    findings = check_folder(tmp_path)
    assert len(findings.errors) == 5
    says(findings.errors, "labels/a.nii.gz", "nothing there")
    says(findings.errors, "images/b.nii.gz", "gzip stream")
    says(findings.errors, "images/c.nii.gz", "HTML")
    says(findings.errors, "labels/d.nii.gz", "shape")
    says(findings.errors, "labels/e.nii.gz", "value 255 in 224 voxels")
    assert len(findings.warnings) == 1
    says(findings.warnings, "labels/f.nii.gz", "empty mask")


def test_d1_a_cohort_whose_file_disappears(tmp_path, put_case):
    put_case("a")
    cohort = open_cohort(tmp_path)
    cohort.cases[0].image.unlink()
    (error,) = check_cohort(cohort).errors
    assert "images/a.nii.gz: image of case a" in str(error)


def test_d31_links_that_lead_round_in_a_circle(tmp_path, put_case):
    for name in "abc":
        put_case(name)
    for path in ("images/a.nii.gz", "labels/b.nii.gz"):
        (tmp_path / path).unlink()
        (tmp_path / path).symlink_to(tmp_path / path)
    (tmp_path / "images" / "round").symlink_to(tmp_path / "images")
    findings = check_folder(tmp_path)
    says(findings.errors, "images/a.nii.gz: image of case a: expected a file, got nothing there")
    says(findings.errors, "labels/b.nii.gz: label of case b: expected a file, got nothing there")
    assert len(findings.errors) == 2


def test_d31_a_file_that_may_not_be_read(tmp_path, put_case):
    """The right is missed by a process of nobody's: whoever owns the machine may read everything."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in "ab":
            put_case(name, root=root)
        root.chmod(0o755)
        (root / "images" / "a.nii.gz").chmod(0)

        def as_nobody():
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            (error,) = check_folder(root).errors
            assert "images/a.nii.gz: file: " in str(error), error
            assert "Permission denied" in str(error), error

        check_folder(root)  # imports what the other cannot
        assert Child(as_nobody).wait() == 0


def test_d13_slices_in_another_plane_than_in_most_cases_are_told(tmp_path, put_case):
    for name, spacing in (("a", (0.8, 0.8, 1.5)), ("b", (0.8, 0.8, 1.5)), ("z", (0.8, 0.9, 0.5))):
        put_case(name, affine=np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]), labels=None)
    says(check_folder(tmp_path).warnings, "slices are coronal in z, and axial in most cases")
    (tmp_path / "images" / "z.nii.gz").unlink()
    assert not [warning for warning in check_folder(tmp_path).warnings if "slices are" in warning]


def test_notes_become_warnings(tmp_path, put_case):
    put_case("a", affine=np.diag([-1.0, -1.0, 300.0, 1.0]))
    findings = check_folder(tmp_path)
    assert not findings.errors
    says(findings.warnings, "images/a.nii.gz: spacing: ")
    says(findings.warnings, "labels/a.nii.gz: spacing: ")


def test_d17_values_that_are_no_target(tmp_path, put_case):
    labels = np.zeros((4, 7, 8), np.uint8)
    labels[0, 0, :3] = (1, 2, 3)
    for name in "ab":
        put_case(name, labels=labels)
    findings = check_folder(tmp_path, targets={"lv": 3})
    assert not findings.errors
    assert len(findings.warnings) == 2
    says(findings.warnings, "label value 2 is no target and becomes background in 2 cases")


def test_d26_class_in_no_case(tmp_path, put_case):
    for name in "ab":
        put_case(name)
    (error,) = check_folder(tmp_path, targets={"seen": 1, "absent": 7}).errors
    assert "class 'absent': expected at least one case that shows it, got none of 2 cases" in str(error)


def test_a_cohort_without_labels_has_no_classes_to_miss(tmp_path, put_case):
    put_case("a", labels=None)
    assert check_folder(tmp_path).errors == ()


def test_d28_same_voxels_in_two_cases(tmp_path, put_case):
    """Found by voxels, not by file: the second copy is stored uncompressed."""
    put_case("p1_a", seed=7)
    put_case("p2_a", seed=7, suffix=".nii")
    put_case("p2_b", seed=8)
    (error,) = check_folder(tmp_path).errors
    assert "p2_a and p1_a have the same voxels" in str(error)
    assert "leak" in str(error)
    findings = check_folder(tmp_path, patient_pattern="p")
    assert not findings.errors
    says(findings.warnings, "p2_a and p1_a have the same voxels")


def test_no_case_at_all(tmp_path):
    with pytest.raises(DataError, match="none that is known"):
        check_folder(tmp_path)


# --------------------------------------------------------------------------------------------- digests


@pytest.fixture
def recorded(tmp_path, put_case):
    """A cohort of plain files and the manifest of their digests."""
    root = tmp_path / "cohort"
    for name in "ab":
        put_case(name, suffix=".nii", root=root)
    manifest = tmp_path / "digests.json"
    assert check_folder(root, digests=manifest).errors == ()
    return root, manifest


def test_d6_changed_byte_in_a_plain_file(recorded):
    root, manifest = recorded
    assert check_folder(root, digests=manifest) == check_folder(root)
    path = root / "images" / "a.nii"
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(bytes(content))
    assert check_folder(root).errors == ()
    (error,) = check_folder(root, digests=manifest).errors
    assert "images/a.nii: digest" in str(error)


def test_d6_files_come_and_go(recorded, put_case):
    root, manifest = recorded
    for folder in ("images", "labels"):
        (root / folder / "a.nii").unlink()
    put_case("c", suffix=".nii", root=root)
    findings = check_folder(root, digests=manifest)
    assert len(findings.errors) == 2
    says(findings.errors, "images/a.nii", "no such file in the cohort")
    assert len(findings.warnings) == 2
    says(findings.warnings, "images/c.nii: digest: not in")


def test_d6_no_manifest_of_a_broken_cohort(tmp_path, put_case):
    put_case("a")
    (tmp_path / "images/a.nii.gz").write_bytes(b"")
    assert len(check_folder(tmp_path, digests=tmp_path / "digests.json").errors) == 1
    assert not (tmp_path / "digests.json").exists()


@pytest.mark.parametrize("name", ["../secret", "images/../../secret", "/etc/passwd"])
def test_d30_manifest_points_outside(recorded, name):
    root, manifest = recorded
    content = json.loads(manifest.read_text())
    content["sha256"][name] = "0" * 64
    manifest.write_text(json.dumps(content))
    says(check_folder(root, digests=manifest).errors, str(manifest), name, "below the cohort's folder")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sha256": 3}'])
def test_unreadable_manifest(recorded, text):
    root, manifest = recorded
    manifest.write_text(text)
    (error,) = check_folder(root, digests=manifest).errors
    assert str(manifest) in str(error)
