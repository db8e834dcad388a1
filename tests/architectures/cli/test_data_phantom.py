"""``trifuse data phantom``: the ambiguous phantom as a cohort on disk, and wishes that make no sense."""

from __future__ import annotations

from collections import Counter

import pytest
from command import run_main

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.phantoms.ambiguous import read_truth

SMALL = ["--train", 6, "--val", 1, "--test", 3, "--size", 16, 16, 3, "--beats", 2]


def test_a_cohort_is_written_as_asked(tmp_path, capsys):
    out = tmp_path / "phantom"
    words = ["data", "phantom", "--out", out, *SMALL, "--missing", "0.5", "--wrong", "0.5", "--seed", 3]
    code, output, _ = run_main(words, capsys)
    assert code == 0
    assert f"10 cases, of which 3 test, and 2 beats in {out}" in output
    cohort = open_cohort(out)
    assert [len(part) for part in (cohort.split.train, cohort.split.val, cohort.split.test)] == [6, 1, 3]
    assert set(Counter(case["ecg"] for case in read_truth(out).values())) == {"none", "wrong"}
    assert len([*(out / "beats").iterdir()]) == 2
    code, _, errors = run_main(words, capsys)
    assert (code, "is not an empty folder; choose another name" in errors) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", 0], "expected a case to train on"),
        (["--missing", "0.9", "--wrong", "0.2"], "together at most 1, got 0.9 and 0.2"),
        (["--size", 64, 64], "expected 3 arguments"),
        (["--size", 1, 1, 1], "each case shows a scar and its like, got 1 x 1 x 1; 24 x 24 x 3 does"),
        (["--size", 64, 64, 1], "got 64 x 64 x 1"),
    ],
)
def test_wishes_that_make_no_sense(words, message, tmp_path, capsys):
    code, _, errors = run_main(["data", "phantom", "--out", tmp_path / "phantom", *words], capsys)
    assert (code, [*tmp_path.iterdir()]) == (2, [])
    assert message in errors
