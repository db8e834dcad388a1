"""The README's ten rows: taken from result files, the fastest other form named by its time, nothing filled in."""

from __future__ import annotations

import json

import pytest

from trifuse.benchmarks.reporting import highlights as page
from trifuse.benchmarks.reporting.highlights import highlights
from trifuse.benchmarks.reporting.tables import with_results

WHERE = {"case": "a map, float32", "pass": "forward"}


def row(provider, median_ms, speedup):
    return {**WHERE, "provider": provider, "median_ms": median_ms, "speedup": speedup, "peak_mib": 10 * median_ms}


ROWS = [
    row("by hand", 10.0, 1.0),
    row("torch.compile of it", 6.0, 1.67),
    row("MONAI", 5.0, 2.0),
    row("trifuse", 2.5, 4.0),
    row("trifuse, packed", 0.5, 20.0),
    row("torch.compile of trifuse", 1.0, 10.0),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "ROWS", [("some_op", WHERE["case"], WHERE["pass"])])
    write(tmp_path, ROWS)
    return tmp_path


def write(folder, rows):
    record = {"benchmark": "some_op", "baseline": "by hand", "rows": rows}
    (folder / "some_op.cpu.json").write_text(json.dumps(record))


def test_a_row_shows_the_fastest_other_form_and_both_of_ours(folder):
    *_, line = highlights(folder, "cpu").splitlines()
    assert line == "| `some_op`: a map | forward | 10 | 5 | 2.5 | 1 | 4.00 | 100 → 25 |"


def test_what_was_not_measured_stays_empty(folder):
    write(folder, [ROWS[0], ROWS[3]])
    *_, line = highlights(folder, "cpu").splitlines()
    assert line == "| `some_op`: a map | forward | 10 |  | 2.5 |  | 4.00 | 100 → 25 |"


def test_a_row_that_no_file_has_is_named(folder):
    write(folder, ROWS[:3])
    with pytest.raises(KeyError, match="some_op: no row of 'trifuse' and 'by hand' for a map"):
        highlights(folder, "cpu")


def test_a_page_takes_it_in(folder):
    text = with_results("before\n<!-- highlights: cpu -->\nold\n<!-- end -->\nafter", folder)
    assert text == f"before\n<!-- highlights: cpu -->\n\n{highlights(folder, 'cpu')}\n\n<!-- end -->\nafter"


def test_there_are_ten():
    assert len(page.ROWS) == len(set(page.ROWS)) == 10
