"""Write the table of faults, docs/faults.md, from faults.csv and from the tests that carry a row's id.

    python tests/support/fault_table.py

A test carries an id in its name, ``test_d5_wrong_checksum``, or in its docstring, ``D5: ...``.
"""

from __future__ import annotations

import ast
import csv
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "faults.md"
SECTIONS = {
    "K": "Operators",
    "B": "Blocks and networks",
    "D": "Images, labels and cohorts",
    "E": "ECGs and the AHA segments",
    "C": "Checkpoints and conversion",
    "T": "Training and several processes",
    "L": "The command line",
}
_IN_NAME = re.compile(rf"(?<![a-z0-9])[{''.join(SECTIONS).lower()}]\d+(?![a-z0-9])")
_IN_DOCSTRING = re.compile(rf"\b[{''.join(SECTIONS)}]\d+\b(?=[^.:]*:)")


def rows() -> list[dict[str, str]]:
    """Return the rows: id, fault, promise, and why there is no test where there is none."""
    with (Path(__file__).parent / "faults.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ids_of(test: ast.FunctionDef) -> set[str]:
    """Return the ids that a test carries in its name, and before the colon in its docstring."""
    docstring = ast.get_docstring(test) or ""
    return {id_.upper() for id_ in _IN_NAME.findall(test.name)} | set(_IN_DOCSTRING.findall(docstring))


def files_by_id() -> dict[str, Counter[str]]:
    """Return, for each id, how many tests of which file carry it."""
    found: dict[str, Counter[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for id_ in ids_of(node):
                    found.setdefault(id_, Counter())[path.relative_to(ROOT).as_posix()] += 1
    return found


def page() -> str:
    """Return the page."""
    tests = files_by_id()
    text = [
        "# Faults and bad input",
        "What may go wrong, what happens then, and how many tests of which file hold it: they carry the row's id. "
        "`make faults` writes this page from the tests.",
    ]
    for letter, title in SECTIONS.items():
        lines = ["| id | what goes wrong | what happens | tests |", "| --- | --- | --- | --- |"]
        for row in rows():
            if row["id"][0] == letter:
                files = ", ".join(f"`{name}` ({count})" for name, count in tests.get(row["id"], Counter()).items())
                lines.append(f"| {row['id']} | {row['fault']} | {row['promise'] or row['without_test']} | {files} |")
        text += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
