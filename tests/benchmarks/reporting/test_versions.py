"""The table of tested versions has a row for each verdict."""

from __future__ import annotations

from trifuse.benchmarks.reporting.tables import with_results
from trifuse.benchmarks.reporting.versions import COLUMNS, versions_table
from trifuse.kernels.tested_versions import VERSIONS, read_verdicts


def test_a_row_for_each_pair():
    heading, _, *rows = versions_table().splitlines()
    assert heading == f"| {' | '.join(COLUMNS)} |"
    verdicts = read_verdicts(VERSIONS)
    assert len(rows) == len(verdicts)
    for row, verdict in zip(rows, verdicts, strict=True):
        assert row.startswith(f"| {verdict['torch']} | {verdict['triton']} |")
        assert f"| {verdict['commit']} |" in row


def test_a_page_takes_it_in(tmp_path):
    text = with_results("before\n<!-- versions: tested -->\nold\n<!-- end -->\nafter", tmp_path)
    assert text == f"before\n<!-- versions: tested -->\n\n{versions_table()}\n\n<!-- end -->\nafter"
