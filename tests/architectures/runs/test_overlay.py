"""Runs beside each other: their cohort, the cases they share, their names, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.layouts.split import Split, write_split
from trifuse.architectures.data.volumes.nifti import new_volume, write_image, write_labels
from trifuse.architectures.runs.overlay import compare_overlay
from trifuse.kernels import CheckpointError, DataError


def write_cohort(root: Path) -> Path:
    """Write four cases of noise with a square on two of three slices."""
    for number, case_id in enumerate("pqrs"):
        noise = np.random.default_rng(number).normal(100, 10, (20, 24, 3)).astype(np.float32)
        image = new_volume(noise, np.diag([1.5, 1.5, 8.0, 1.0]))
        labels = np.zeros(noise.shape, np.uint8)
        labels[6:14, 6:16, 1:] = 1
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        write_image(root / "images" / f"{case_id}.nii.gz", image.voxels, image)
        write_labels(root / "labels" / f"{case_id}.nii.gz", new_volume(labels, np.eye(4)).voxels, image)
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return write_cohort(tmp_path / "cohort")


def write_run(
    folder: Path,
    cohort: Cohort,
    test: tuple[str, ...],
    *,
    part: str = "test",
    missing: str = "",
    root: Path | None = None,
) -> Path:
    """Write what a run leaves behind, as far as it is looked at: its data, its split, its predictions."""
    (folder / "predictions" / part).mkdir(parents=True)
    config = {"data": {"root": str(root or cohort.root)}}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    names = [case.case_id for case in cohort.cases]
    parts = {"train": tuple(name for name in names if name not in test), "val": (), "test": (), part: test}
    write_split(folder / "split.json", Split(**parts))
    for name in set(test) - {missing}:
        _, truth = load_case(cohort, cohort.case(name))
        write_labels(folder / "predictions" / part / f"{name}.nii.gz", np.roll(truth.voxels, 1, 1), truth)
    return folder


def test_the_cases_that_all_runs_predicted(root, tmp_path):
    cohort = open_cohort(root)
    one, two, three, _ = (case.case_id for case in cohort.cases)
    a = write_run(tmp_path / "a", cohort, (one, two))
    b = write_run(tmp_path / "b", cohort, (two, one, three))
    c = write_run(tmp_path / "c", cohort, (one, two), missing=two)
    picture = compare_overlay([b, a, c], tmp_path / "out")
    assert picture.png.exists()
    assert "of 2 cases" in picture.alt
    assert "3 models" in picture.alt
    assert f"{two}: b 0." in picture.alt
    assert "c 0.000" in picture.alt
    assert f"{three}: a" not in picture.alt


def test_runs_of_one_name_are_told_apart(root, tmp_path):
    cohort = open_cohort(root)
    cases = (cohort.cases[0].case_id,)
    runs = [write_run(tmp_path / name / "run", cohort, cases) for name in ("dino", "plain")]
    assert "dino/run 0." in compare_overlay(runs, tmp_path / "out").alt
    with pytest.raises(DataError, match="the same folder twice"):
        compare_overlay([runs[0], runs[0]], tmp_path / "out")


def test_runs_without_test_cases_show_those_that_validated(root, tmp_path):
    cohort = open_cohort(root)
    cases = (cohort.cases[0].case_id,)
    runs = [write_run(tmp_path / name, cohort, cases, part="val") for name in ("a", "b")]
    assert f"{cases[0]}: a 0." in compare_overlay(runs, tmp_path / "out").alt


def test_what_cannot_be_compared(root, tmp_path):
    cohort = open_cohort(root)
    one, two, *_ = (case.case_id for case in cohort.cases)
    a, b = write_run(tmp_path / "a", cohort, (one,)), write_run(tmp_path / "b", cohort, (two,))
    with pytest.raises(DataError, match="none in common"):
        compare_overlay([a, b], tmp_path / "out")
    other = write_run(tmp_path / "c", cohort, (one,), root=write_cohort(tmp_path / "other"))
    for runs in ([a, other], [a, b, other]):
        with pytest.raises(DataError, match=r"cohort: expected .*, as the first run has, got .*other"):
            compare_overlay(runs, tmp_path / "out")
    renamed = write_run(tmp_path / "d", cohort, (one,))
    (renamed / "run.json").write_text(json.dumps({"config": {"data": {"root": str(root), "targets": ["atrium=1"]}}}))
    with pytest.raises(DataError, match=r"classes: expected .*, as the first run has, got .*atrium"):
        compare_overlay([a, renamed], tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected the description of a run of trifuse"):
        compare_overlay([a, tmp_path], tmp_path / "out")
