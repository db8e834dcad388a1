"""The table of faults is what the tests say: no row without a test or a reason, and no id that is no row."""

from __future__ import annotations

import ast
from collections import Counter

import pytest
from fault_table import PAGE, files_by_id, ids_of, page, rows

ROWS = rows()


def test_ids_are_unique_and_rows_complete():
    assert [id_ for id_, count in Counter(row["id"] for row in ROWS).items() if count > 1] == []
    for row in ROWS:
        assert row["fault"], row
        assert bool(row["promise"]) != bool(row["without_test"]), row


def test_every_row_has_a_test_or_a_reason_and_never_both():
    tested = files_by_id()
    assert [row["id"] for row in ROWS if row["promise"] and row["id"] not in tested] == []
    assert [row["id"] for row in ROWS if row["without_test"] and row["id"] in tested] == []
    assert sorted(tested.keys() - {row["id"] for row in ROWS}) == []


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make faults"


@pytest.mark.parametrize(
    ("test", "ids"),
    [
        ("def test_d5_wrong_checksum(): pass", {"D5"}),
        ("def test_k1_k4_refuses(): pass", {"K1", "K4"}),
        ("def test_ranks_equal_one_t12(): pass", {"T12"}),
        ("def test_block3_of_md5_and_nd4(): pass", set()),
        ('def test_values():\n    """K14: odd sizes."""', {"K14"}),
        ('def test_values():\n    """K14, K15: odd sizes of D3."""', {"K14", "K15"}),
        ('def test_values():\n    """Odd sizes of K14."""', set()),
    ],
)
def test_ids_of_a_test(test, ids):
    (function,) = ast.parse(test).body
    assert ids_of(function) == ids
