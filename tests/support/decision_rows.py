"""The table of decisions in a report, read back."""

from __future__ import annotations

from trifuse.architectures.runs.decisions import HEADING


def decision_rows(table: str) -> dict[str, list[str]]:
    """Return the cells of each question: what the paper says, the answer, what it differs from, the option."""
    lines = [line.removeprefix("| ").removesuffix(" |") for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]
    return {question: rest for question, *rest in cells}


def decisions_of_report(report: str) -> dict[str, list[str]]:
    """Return `decision_rows` of the section of a report, which stands between its making and the paper's tables."""
    made, section = report.split(f"\n## {HEADING}\n")
    assert "## How it was made" in made
    assert "## What the paper reports" not in made
    return decision_rows(section.partition("\n## ")[0])
