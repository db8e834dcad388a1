"""What is said about the versions that are installed."""

from __future__ import annotations

import pytest

from trifuse.kernels import tested_versions

PAIRS = [
    {"torch": "2.10.0", "triton": "3.6.0", "passed": "1700", "failed": "0", "skipped": "90"},
    {
        "torch": "2.13.0",
        "triton": "3.7.1",
        "passed": "1690",
        "failed": "10",
        "skipped": "90",
        "why_skipped": "90 needs a GPU",
    },
]
OTHERS = PAIRS[0] | {"torch": "2.9.0", "others": "floors", "passed": "7"}
VERDICTS = [{"others": ""} | row | {"commit": "0123abcdef01", "date": "2026-01-31"} for row in (*PAIRS, OTHERS)]


@pytest.mark.parametrize(
    ("torch", "triton", "said"),
    [
        (
            "2.10.0+cu128",
            "3.6.0",
            "torch 2.10.0 with triton 3.6.0: 1700 tests passed, none failed, 90 were skipped "
            "(commit 0123abc, 2026-01-31)",
        ),
        (
            "2.13.0",
            "3.7.1",
            "torch 2.13.0 with triton 3.7.1: 1690 tests passed, 10 failed, skipped: 90 need a GPU "
            "(commit 0123abc, 2026-01-31)",
        ),
        (
            "2.13.0",
            "3.6.0",
            "torch 2.13.0 with triton 3.6.0 is not among the tested pairs: 2.10.0 with 3.6.0, 2.13.0 with 3.7.1",
        ),
    ],
)
def test_a_pair_is_found_among_the_verdicts(torch, triton, said):
    assert tested_versions.describe_pair(torch, triton, VERDICTS) == said


def test_what_came_of_the_other_packages_is_told_apart():
    assert tested_versions.describe_others(VERDICTS) == (
        "at the oldest versions that may be installed, torch 2.9.0: 7 tests passed, none failed, 90 were skipped "
        "(commit 0123abc, 2026-01-31)"
    )
    assert tested_versions.describe_others(VERDICTS[:2]) == ""
    assert "not among the tested pairs" in tested_versions.describe_pair("2.9.0", "3.6.0", VERDICTS)


@pytest.mark.parametrize(
    ("triton", "numpy", "wrong"),
    [
        ("3.6.0", "2.4.0", True),
        ("3.6.0", "2.10.1", True),
        ("3.6.0", "2.3.5", False),
        ("3.7.1", "2.4.6", False),
        ("3.10.0", "2.4.6", False),
    ],
)
def test_a_numpy_too_new_for_an_old_triton_is_named_with_its_remedy(triton, numpy, wrong):
    remedy = tested_versions.numpy_remedy(triton, numpy)
    assert bool(remedy) == wrong
    assert remedy.endswith("run: pip install 'numpy<2.4'") == wrong


def test_calls_on_the_virtual_gpu_are_summed_up():
    made_of = {"torch": "2.13.0", "triton": "3.7.1", "commit": "0123abcdef01"}
    rows = [{"operator": operator, "verdict": "sound", "launches": "3"} | made_of for operator in "aab"]
    said = (
        "{} of 3 calls of 2 operators showed no fault on the virtual GPU, in 9 launches of compiled kernels; "
        "no GPU was used (torch 2.13.0, triton 3.7.1, commit 0123abc)"
    )
    assert tested_versions.describe_virtual_gpu(rows) == said.format(3)
    rows[1] |= {"verdict": "wrong: a value"}
    assert tested_versions.describe_virtual_gpu(rows) == said.format(2)
    rows += [rows[0] | {"commit": "89abcdef0123"}, rows[0] | {"torch": "2.14.0"}]
    made_of = "(torch 2.13.0, triton 3.7.1, commit 0123abc, 89abcde; torch 2.14.0, triton 3.7.1, commit 0123abc)"
    assert tested_versions.describe_virtual_gpu(rows).endswith(f"no GPU was used {made_of}")
