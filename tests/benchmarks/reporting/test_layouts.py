"""The table of layouts has a row for each one in the list, with what it is known by and its own options."""

from __future__ import annotations

from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.benchmarks.reporting.layouts import layouts_table
from trifuse.benchmarks.reporting.tables import with_results


def test_a_row_for_each_layout():
    rows = layouts_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [layout.name for layout in LAYOUTS]
    for layout, row in zip(LAYOUTS, rows, strict=True):
        assert layout.summary in row
        assert all(f"`{option.flag}`" in row for option in layout.options)
        assert row.endswith("| yes |") == (layout.export is not None)


def test_a_page_takes_it_in(tmp_path):
    text = with_results("before\n<!-- layouts: all -->\nold\n<!-- end -->\nafter", tmp_path)
    assert text == f"before\n<!-- layouts: all -->\n\n{layouts_table()}\n\n<!-- end -->\nafter"
