"""Splits: by patient, repeatable, written down, and checked for leaks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trifuse.architectures.data.layouts.cohort import Case, Cohort, Split
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.split import hold_out, read_split, split_patients, verify_split, write_split
from trifuse.kernels.errors import CheckpointError, DataError


def cohort_of(patients):
    """A cohort that exists only by name: splitting reads no files."""
    cases = tuple(Case(f"c{n}", patient, Path("i"), Path("l")) for n, patient in enumerate(patients))
    return Cohort(Path("cohort"), "plain", ("background", "foreground"), {0: 0, 1: 1}, False, cases)


def sizes(split):
    return len(split.train), len(split.val), len(split.test)


@pytest.mark.parametrize(
    ("patients", "fractions", "val_from", "expected"),
    [
        (60, (0.7, 0.1, 0.2), "all", (42, 6, 12)),  # LAScarQS, as decided
        (60, (0.7, 0.1, 0.2), "remaining", (43, 5, 12)),
        (103, (0.7, 0.1, 0.2), "all", (72, 10, 21)),  # the LGE-ECG cohort
        (3, (0.7, 0.1, 0.2), "all", (1, 1, 1)),
        (4, (0.8, 0.0, 0.2), "all", (3, 0, 1)),
        (1, (1.0, 0.0, 0.0), "all", (1, 0, 0)),
    ],
)
def test_sizes(patients, fractions, val_from, expected):
    cohort = cohort_of([f"p{n}" for n in range(patients)])
    assert sizes(split_patients(cohort, fractions, val_from=val_from)) == expected


@settings(max_examples=60, deadline=None)
@given(
    patients=st.lists(st.sampled_from([f"p{n}" for n in range(9)]), min_size=5, max_size=30), seed=st.integers(0, 99)
)
def test_every_case_once_and_every_patient_on_one_side(patients, seed):
    cohort = cohort_of(patients)
    if len(set(patients)) < 3:
        with pytest.raises(DataError, match="at least one patient to train on"):
            split_patients(cohort, seed=seed)
        return
    split = split_patients(cohort, seed=seed)
    assert sorted((*split.train, *split.val, *split.test)) == sorted(case.case_id for case in cohort.cases)
    sides = [{cohort.case(case_id).patient for case_id in part} for part in (split.train, split.val, split.test)]
    assert sum(len(side) for side in sides) == len(set(patients))


def test_order_on_disk_has_no_influence_and_the_seed_has():
    cohort = cohort_of([f"p{n}" for n in range(60)])
    turned = replace(cohort, cases=cohort.cases[::-1])
    split, again = split_patients(cohort), split_patients(turned)
    assert [set(part) for part in (split.train, split.val, split.test)] == [
        set(part) for part in (again.train, again.val, again.test)
    ]
    assert set(split_patients(cohort, seed=43).test) != set(split.test)


def test_split_is_the_same_on_every_machine():
    """The shuffle is written down in results: it must not change with a version."""
    split = split_patients(cohort_of([f"p{n}" for n in range(10)]))
    assert (split.val, split.test) == (("c0",), ("c5", "c6"))


@pytest.mark.parametrize("fractions", [(0.5, 0.1, 0.2), (1.2, -0.1, -0.1), (0.0, 0.5, 0.5)])
def test_fractions_that_make_no_sense(fractions):
    with pytest.raises(DataError, match="split fractions"):
        split_patients(cohort_of("abcdef"), fractions)


def test_too_few_patients():
    with pytest.raises(DataError, match=r"2 patients, of which 1 would validate and 1 test"):
        split_patients(cohort_of("aabb"))


# -------------------------------------------------------------------------------- training patients that validate


def test_held_out_patients_validate_with_all_of_their_images_and_train_no_more():
    cohort = cohort_of("aabbccddeef")
    whole = Split(tuple(f"c{n}" for n in range(10)), (), ("c10",))
    split = hold_out(cohort, whole, 2, seed=3)
    assert (len(split.train), len(split.val), split.test) == (6, 4, ("c10",))
    assert sorted((*split.train, *split.val)) == sorted(whole.train)
    assert not {cohort.case(n).patient for n in split.train} & {cohort.case(n).patient for n in split.val}
    assert len({hold_out(cohort, whole, 2, seed=seed).val for seed in range(8)}) > 2


def test_held_out_patients_do_not_depend_on_the_order_of_cases_and_versions():
    cohort, train = cohort_of([f"p{n}" for n in range(18)]), tuple(f"c{n}" for n in range(18))
    assert hold_out(cohort, Split(train, (), ()), 2).val == ("c16", "c17")
    turned = hold_out(replace(cohort, cases=cohort.cases[::-1]), Split(train[::-1], (), ()), 2)
    assert set(turned.val) == {"c16", "c17"}


@pytest.mark.parametrize(
    ("split", "patients", "message"),
    [
        (Split(("c0",), ("c1",), ("c2",)), 1, "1 validation cases in the split.*leave out val_patients"),
        (Split(("c0", "c1"), (), ("c2",)), 2, "1 to 1, so that some of the 2 training patients are left to train on"),
        (Split(("c0", "c1"), (), ("c2",)), 0, "val_patients"),
    ],
)
def test_patients_that_cannot_be_held_out(split, patients, message):
    with pytest.raises(DataError, match=message):
        hold_out(cohort_of("abc"), split, patients)


# ------------------------------------------------------------------------------------------ on real files


@pytest.fixture
def cohort(tmp_path, put_case):
    for name in ("p1_a", "p1_b", "p2_a", "p3_a"):
        put_case(name)
    return open_cohort(tmp_path, patient_pattern=r"p\d")


GOOD = Split(("p1_a", "p1_b"), ("p2_a",), ("p3_a",))


def test_round_trip(cohort, tmp_path):
    write_split(tmp_path / "split.json", GOOD)
    assert read_split(tmp_path / "split.json", cohort) == GOOD
    assert list(json.loads((tmp_path / "split.json").read_text())) == ["train", "val", "test", "unused"]


def test_c22_a_flipped_byte_in_the_split_of_a_run_is_named(cohort, tmp_path):
    path = tmp_path / "split.json"
    write_split(path, GOOD, sealed=True)
    assert read_split(path, cohort) == GOOD
    written = path.read_text()
    path.write_text(written.replace('"p1_b"', '"p1_c"'))
    with pytest.raises(CheckpointError, match=r"split\.json: the content has changed.*or remove 'content_sha256'"):
        read_split(path, cohort)


def test_written_by_hand(cohort, tmp_path):
    path = tmp_path / "split.json"
    path.write_text('{"train": ["p1_a", "p1_b", "p2_a"], "val": [], "test": ["p3_a"]}')
    assert read_split(path, cohort).unused == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": ("p1_a",), "val": ("p1_b", "p2_a")}, ["same patient in two parts", "p1_a in train and p1_b in val"]),
        ({"train": ("p1_a",), "test": ("p3_a", "p1_b")}, ["same patient", "p1_a in train and p1_b in test"]),
        ({"val": ("p2_a", "p1_a")}, ["case 'p1_a'", "named 2 times"]),
        ({"train": ("p1_a", "p1_b", "p9")}, ["unknown cases 'p9'"]),
        ({"val": ()}, ["no part for 'p2_a'", '"unused"']),
        ({"train": (), "unused": ("p1_a", "p1_b")}, ["no training case"]),
        ({"train": ("p1_a", "p1_b", "p8"), "val": ()}, ["2 problems", "unknown cases 'p8'", "no part for 'p2_a'"]),
    ],
)
def test_splits_that_do_not_fit(cohort, changes, words):
    with pytest.raises(DataError) as caught:
        verify_split(cohort, replace(GOOD, **changes))
    for word in words:
        assert word in str(caught.value)


def test_unused_cases_may_share_a_patient(cohort):
    verify_split(cohort, replace(GOOD, train=("p1_a",), unused=("p1_b",)))


def test_d28_same_file_in_two_parts(cohort):
    first, copy = cohort.case("p1_a").image, cohort.case("p3_a").image
    copy.write_bytes(first.read_bytes())
    with pytest.raises(
        DataError, match="same image in two parts: expected one part, got p1_a in train and p3_a in test"
    ):
        verify_split(cohort, GOOD)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["JSON", "line 1 column 2"]),
        ("[]", ["keys", "list"]),
        ('{"train": ["p1_a"], "val": [], "test": [], "train": ["p3_a"]}', ["JSON", "'train' more than once"]),
        ('{"train": [], "test": []}', ["keys"]),
        ('{"train": [], "val": [], "test": [], "fold": 1}', ["keys", "fold"]),
        ('{"train": "p1_a", "val": [], "test": []}', ["train", "list of case ids"]),
        ('{"train": [1], "val": [], "test": []}', ["train", "list of case ids"]),
        (None, ["No such file"]),
    ],
)
def test_l3_unreadable_splits(cohort, tmp_path, text, words):
    path = tmp_path / "split.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_split(path, cohort)
    for word in (str(path), *words):
        assert word in str(caught.value)
