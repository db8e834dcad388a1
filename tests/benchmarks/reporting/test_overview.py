"""The overview has one line for each case and pass, with every kind of form in its column."""

from __future__ import annotations

import json

from trifuse.benchmarks.reporting.overview import overview
from trifuse.benchmarks.reporting.tables import with_results


def row(provider, median_ms, speedup, timed="forward"):
    times = {"median_ms": median_ms, "speedup": speedup, "peak_mib": 10 * median_ms}
    return {"case": "a map", "pass": timed, "provider": provider, **times}


ROWS = [
    row("by hand", 1234.5, 1.0),
    row("torch.compile of it", 5.0, 2.0),
    row("NATTEN", 8.0, 1.25),
    row("MONAI", 7.0, 1.43),
    row("trifuse", 2.5, 4.0),
    row("trifuse, packed", 2.0, 5.0),
    row("torch.compile of trifuse", 1.0, 10.0),
    row("by hand", 0.12345, 1.0, timed="backward"),
]
RECORD = {"benchmark": "some_op", "baseline": "by hand", "rows": ROWS}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_for_each_case_and_pass(tmp_path):
    (tmp_path / "some_op.cpu.json").write_text(json.dumps(RECORD))
    (tmp_path / "some_op.cuda.json").write_text(json.dumps(RECORD))
    (tmp_path / "kernels.cpu.json").write_text(json.dumps({"rows": []}))  # not a comparison
    _, _, forward, backward = map(cells, overview(tmp_path, "cpu").splitlines())
    what, timed, *times = forward
    assert (what, timed) == ("some op: a map", "forward")
    assert times == ["1,234", "5", "7 (MONAI)", "2.5", "4.00", "1", "10.00", "1.23e+04 → 25"]
    assert backward[2:] == ["0.123", "", "", "", "", "", "", "1.23"]


def test_nothing_is_told_against_what_people_write_where_that_was_refused(tmp_path):
    rows = [*ROWS, row("trifuse", 2.5, None, "refused"), row("torch.compile of trifuse", 1.0, None, "refused")]
    (tmp_path / "some_op.cpu.json").write_text(json.dumps(RECORD | {"rows": rows}))
    *_, line = map(cells, overview(tmp_path, "cpu").splitlines())
    assert line[1:] == ["refused", "", "", "", "2.5", "", "1", "", "25"]


def test_a_page_takes_it_in(tmp_path):
    (tmp_path / "some_op.cpu.json").write_text(json.dumps(RECORD))
    text = with_results("before\n<!-- overview: cpu -->\nold\n<!-- end -->\nafter", tmp_path)
    assert text == f"before\n<!-- overview: cpu -->\n\n{overview(tmp_path, 'cpu')}\n\n<!-- end -->\nafter"
