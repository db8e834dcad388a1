"""Cohorts of 30,000 cases: every step over them takes a time that grows with their number, not with its square."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trifuse.architectures.data.layouts.cohort import Case, Cohort, Split
from trifuse.architectures.data.layouts.found import grouped_slices
from trifuse.architectures.data.layouts.nnunet_json import read_description
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.split import hold_out, read_split, split_patients, verify_split
from trifuse.architectures.data.layouts.synapse import scan_synapse
from trifuse.architectures.runs.recipes import DataRecipe, matching_cases
from trifuse.kernels import DataError

CASES = 30_000
SECONDS = 4
"""Each step takes well below one; what grows with the square takes minutes."""

NAMES = tuple(f"case_{number}" for number in range(CASES))


class Unread(Case):
    """A case without files: the digest of its image is its name."""

    def image_digest(self) -> str:
        return self.case_id


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    cases = tuple(Unread(name, f"patient_{name}", Path(f"/x/{name}.nii.gz"), None) for name in NAMES)
    return Cohort(Path("/x"), "plain", ("background", "a"), None, False, cases)


def _from_json(cohort: Cohort, folder: Path) -> None:
    parts = {"train": NAMES[100:], "val": NAMES[:50], "test": NAMES[50:100]}
    (folder / "split.json").write_text(json.dumps(parts))
    assert read_split(folder / "split.json", cohort).val == NAMES[:50]


def _list_of_slices(cohort: Cohort, folder: Path) -> None:
    (folder / "train_npz").mkdir()
    (folder / "lists_Synapse").mkdir()
    (folder / "lists_Synapse" / "train.txt").write_text("".join(f"{name}_slice000\n" for name in NAMES))
    assert "and 29990 more" in str(scan_synapse(folder).problems[0])


def _description(cohort: Cohort, folder: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": {name: number for number, name in enumerate(NAMES)}}))
    read_description(folder)


STEPS: dict[str, Callable[[Cohort, Path], object]] = {
    "split_patients": lambda cohort, folder: split_patients(cohort),
    "verify_split": lambda cohort, folder: verify_split(cohort, Split(NAMES[:-9], (), NAMES[-9:])),
    "hold_out": lambda cohort, folder: hold_out(cohort, Split(NAMES, (), ()), 9000),
    "choose_split": lambda cohort, folder: DataRecipe(test_cases=("*7",), val_cases=("*8",)).choose_split(cohort),
    "matching_cases": lambda cohort, folder: matching_cases(cohort, NAMES, NAMES),
    "case": lambda cohort, folder: [cohort.case(name) for name in NAMES],
    "split.json": _from_json,
    "lists of slices": _list_of_slices,
    "dataset.json": _description,
}


@pytest.mark.parametrize("step", STEPS)
def test_d43_30000_cases_in_seconds(cohort, step, tmp_path):
    start = time.process_time()
    STEPS[step](cohort, tmp_path)
    assert time.process_time() - start < SECONDS


def test_d43_what_is_wrong_with_many_cases_is_cut_and_counted(cohort):
    with pytest.raises(DataError) as caught:
        verify_split(cohort, Split((*NAMES[:9], *(f"other_{name}" for name in NAMES)), (), ()))
    message = str(caught.value)
    assert "unknown cases 'other_case_0', 'other_case_1'" in message
    assert "'other_case_9' and 29990 more" in message
    assert "no part for 'case_9', " in message
    assert "and 29981 more" in message
    with pytest.raises(DataError, match="'case_9' and 29990 more"):
        cohort.case("stranger")
    with pytest.raises(DataError, match="'case_9' and 29990 more"):
        matching_cases(cohort, NAMES, ["stranger*"])


def test_gaps_between_slices_are_counted_by_their_ends():
    notes: list[str] = []
    slices = [("a", number, Path(f"/x/{number}")) for number in (0, 1, 3, 10**15)]
    assert len(grouped_slices(slices, [], notes)["a"]) == 4
    assert notes == [f"a: between slices 0 and {10**15} there is no slice 2, 4 to {10**15 - 1}"]


# ------------------------------------------------------------------------------------------ many classes


def put_labels(root: Path, classes: int) -> None:
    for name in ("imagesTr/c_0000.nii.gz", "labelsTr/c.nii.gz"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    labels = {"background": 0, **{f"r{value}": value for value in range(1, classes)}}
    values = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(values))


def test_d17_d29_as_many_classes_as_a_label_map_holds(tmp_path):
    put_labels(tmp_path, 256)
    assert len(open_cohort(tmp_path).class_names) == 256


@pytest.mark.parametrize("classes", [257, 301, 3000])
def test_d17_d29_more_classes_than_a_label_map_holds(classes, tmp_path):
    put_labels(tmp_path, classes)
    with pytest.raises(DataError, match=f"classes: expected at most 255.* got {classes - 1} beside the background"):
        open_cohort(tmp_path)
    with pytest.raises(DataError, match="classes: expected at most 255"):
        open_cohort(tmp_path, targets={f"r{value}": value for value in range(1, classes)})
    some = open_cohort(tmp_path, targets={"one": 256, "two": [1, 2, 3]})
    assert some.class_names == ("background", "one", "two")
