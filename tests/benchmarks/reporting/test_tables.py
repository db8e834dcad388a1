"""The tables of result files are printed, and brought up to date on every page that shows one."""

from __future__ import annotations

import json

import pytest

from trifuse.benchmarks.reporting import tables

STALE = "before\n<!-- results: {name} -->\nold\n<!-- end -->\nafter\n"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of what the command looks at: pages, and results."""
    for name in ("README.md", "docs/index.md", "docs/reference/costs.md"):
        page = tmp_path / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(STALE.format(name="costs.md"))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "costs.md").write_text("| a table |\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return tmp_path


FRESH = "before\n<!-- results: costs.md -->\n\n| a table |\n\n<!-- end -->\nafter\n"


def test_all_pages_are_brought_up_to_date(house):
    tables.main([])
    assert [page.relative_to(house).as_posix() for page in tables.pages()] == [
        "README.md", "docs/index.md", "docs/reference/costs.md"
    ]  # fmt: skip
    assert {page.read_text() for page in tables.pages()} == {FRESH}


def test_only_the_named_page_is(house):
    tables.main([str(house / "docs" / "index.md")])
    assert [page.read_text() == FRESH for page in tables.pages()] == [False, True, False]


def test_a_page_that_is_up_to_date_is_not_written(house, monkeypatch):
    tables.main([])
    monkeypatch.setattr(tables, "write_text", lambda path, text: pytest.fail(f"{path} was written"))
    tables.main([])


def test_a_result_file_is_printed(capsys):
    path = tables.RESULTS / "channel_gate.cpu.json"
    tables.main([str(path)])
    assert capsys.readouterr().out.strip() == tables.markdown(json.loads(path.read_text())).strip()
