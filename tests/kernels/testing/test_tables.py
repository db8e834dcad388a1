"""Tables show the digits that count, and no empty column."""

from __future__ import annotations

import pytest

from trifuse.kernels.testing import tables


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0, "0"), (0.00098, "0.001"), (0.0123, "0.012"), (1.234, "1.2"), (1234.5, "1234")]
)
def test_tables_show_the_digits_that_count(value, text):
    assert tables._digits(value, 2) == text


def test_tables_leave_empty_columns_out():
    lines = list(tables.table([["first", "", "1.0"], ["second one", "", ""]], ["form", "never", "ms"]))
    assert lines == ["| form       |  ms |", "| ---------- | --: |", "| first      | 1.0 |", "| second one |     |"]


def test_each_column_has_its_digits_and_units():
    row = {"provider": "fused", "median_ms": 0.12345, "fifth_ms": 0.1234, "four_fifths_ms": 1.2345, "speedup": 1.666}
    row |= {"peak_mib": 12.34, "saved_mib": 0.1234, "gb_per_s": 123.4, "gflop_per_s": 1.234, "of_ceiling": 0.456}
    row["launches"] = 3
    assert [cell(row) for cell in tables.COLUMNS.values()] == [
        *("fused", "0.123", "0.123–1.23", "1.67", "12", "0.12", "123", "1.2", "46%", "3"),
    ]
    nothing = dict.fromkeys(("speedup", "of_ceiling", "gb_per_s", "gflop_per_s", "saved_mib", "peak_mib"))
    assert [cell({**row, **nothing, "launches": 0}) for cell in tables.COLUMNS.values()][3:] == [""] * 7
