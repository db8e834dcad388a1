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
