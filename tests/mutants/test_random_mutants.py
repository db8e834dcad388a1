"""Random mutants: what is drawn, which tests are nearest, what counts as noticed, and what the table of them says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for run, which random_mutants imports; other folders have one, too
others = sys.modules.pop("run", None)

import random_mutants as mutants  # noqa: E402

sys.modules.pop("run")
if others is not None:
    sys.modules["run"] = others

SOURCE = """
def clip(value: int | None, least: int = 3) -> int | None:
    if value is None or value < least:
        return -least
    return value * 2
"""
CLIP = mutants.Place("clip.py", 3, 30, "core/ReplaceComparisonOperator_Lt_LtE", 0)


@pytest.fixture
def clip(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("cosmic_ray", reason="cosmic-ray draws the mutants: pip install 'trifuse[mutation]'")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "clip.py").write_text(SOURCE)
    return tmp_path / "clip.py"


def test_what_is_drawn_is_python_outside_of_annotations_and_decided_by_the_seed(clip):
    drawn = mutants.draw(100, 0, [clip])
    assert {(place.line, place.column) for place in drawn} == {
        *((2, 41), (3, 7), (3, 13), (3, 21), (3, 30), (4, 15), (5, 17), (5, 19)),
    }
    assert drawn == mutants.draw(100, 0, [clip]) != mutants.draw(100, 1, [clip])
    assert mutants.draw(3, 0, [clip]) == drawn[:3]
    for place in drawn:
        assert mutants.changed(place) != SOURCE
        compile(mutants.changed(place), "mutant", "exec")


def test_a_place_is_where_it_says(clip):
    assert CLIP in mutants.places(clip)
    lines = [line for line in mutants.patch_of(CLIP).splitlines() if line[:1] in "+-"]
    assert lines[2:] == [
        "-    if value is None or value < least:",
        "+    if value is None or value <= least:",
    ]


def test_a_place_in_another_file_than_was_drawn_from_is_refused(clip):
    clip.write_text("\n" + SOURCE)
    with pytest.raises(ValueError, match="no such change: Place"):
        mutants.changed(CLIP)


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ([mutants.GREEN, mutants.GREEN], ("survived", "")),
        ([mutants.NO_TESTS, mutants.GREEN], ("survived", "")),
        ([mutants.GREEN, 1], ("noticed", "tests/test_a.py::test_b[1]")),
        ([2], ("noticed", "tests/test_a.py::test_b[1]")),
        ([-9], ("noticed", "tests/test_a.py::test_b[1]")),
    ],
)
def test_whatever_is_not_green_has_noticed_and_no_further_ring_is_run(codes, verdict, monkeypatch):
    said = iter(codes)

    def run_tests(tests, patch):
        code = next(said)
        return code, "" if code == mutants.GREEN else "1 failed\nFAILED tests/test_a.py::test_b[1] - assert 1 == 2\n"

    monkeypatch.setattr(mutants, "run_tests", run_tests)
    monkeypatch.setattr(mutants, "patch_of", lambda place: "a patch")
    assert mutants.outcome(CLIP, [["tests/test_a.py"], ["tests"]]) == verdict
    assert [*said] == []


@pytest.mark.parametrize(
    ("file", "nearest", "further"),
    [
        ("kernels/gpu/gates.py", "tests/kernels/ops/test_gates.py", "tests/kernels/ops/test_monte_carlo_pool.py"),
        ("architectures/fias/ablate.py", "tests/architectures/fias/test_ablate.py", None),
        (
            "kernels/gpu/segment_film_gate_backward.py",
            "tests/kernels/ops/test_segment_film_gate.py",
            None,
        ),
        ("architectures/training/ema.py", "tests/architectures/training/test_ema.py", None),
    ],
)
def test_the_nearest_tests_come_first(file, nearest, further):
    rings = mutants.rings(file)
    assert nearest in rings[0]
    assert rings[-2:] == [[f"tests/{file.split('/')[0]}"], ["tests"]]
    if further is not None:
        assert further in rings[1]


def test_rings_hold_tests_that_exist():
    paths = [path for folder in mutants.LIBRARY for path in sorted((mutants.ROOT / folder).rglob("*.py"))]
    for path in paths[::20]:
        for tests in mutants.rings(path.relative_to(mutants.ROOT).as_posix()):
            assert all((mutants.ROOT / test.partition("::")[0]).exists() for test in tests)


def test_at_most_one_in_twenty_of_two_hundred_survived_and_each_that_is_equivalent_has_its_reason():
    rows = mutants.read_table()
    assert len(rows) >= 200
    assert {*rows[0]} == {*mutants.COLUMNS}
    assert {row["verdict"] for row in rows} <= {"noticed", "survived"}
    assert all(row["commit"] for row in rows), "run: python tests/mutants/random_mutants.py --survivors"
    assert not [row for row in rows if row["verdict"] == "noticed" and row["equivalent_because"]]
    alive = [row for row in rows if row["verdict"] == "survived" and not row["equivalent_because"]]
    assert len(alive) <= len(rows) // 20
    assert all(row["noticed_by"] for row in rows if row["verdict"] == "noticed")
