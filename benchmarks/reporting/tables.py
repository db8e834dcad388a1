"""Turn result files into the Markdown tables that the README and the pages of docs/ show.

    python -m trifuse.benchmarks.reporting.tables                  # bring all pages up to date
    python -m trifuse.benchmarks.reporting.tables PAGE.md ...      # or some of them
    python -m trifuse.benchmarks.reporting.tables RESULT.json ...  # print result files as tables

A page takes a result file in where it says ``<!-- results: NAME -->``, up to ``<!-- end -->``; one line for each case
and pass of all files of a kind of device where it says ``<!-- overview: cpu -->``; ten of these lines where it says
``<!-- highlights: cpu -->``; the layouts of cohorts where it says ``<!-- layouts: all -->``; what a network's paper
says, and what is decided, where it says ``<!-- decisions: NETWORK -->``; what carries each statement of a paper where
it says ``<!-- fidelity: NETWORK -->``; and the tested versions of torch and Triton where it says
``<!-- versions: tested -->``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from trifuse.architectures.storage.atomic_files import write_text
from trifuse.kernels.testing.tables import markdown

from .decisions import decisions_table
from .fidelity import fidelity_tables
from .highlights import highlights
from .layouts import layouts_table
from .overview import overview
from .versions import versions_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OTHER_SECTIONS = {
    "overview": overview,
    "highlights": highlights,
    "decisions": lambda folder, name: decisions_table(name),
    "fidelity": lambda folder, name: fidelity_tables(name),
    "layouts": lambda folder, name: layouts_table(),
    "versions": lambda folder, name: versions_table(),
}


def markdown_of_file(path: Path) -> str:
    """Return a result file as text."""
    return markdown(json.loads(path.read_text(encoding="utf-8")))


def with_results(text: str, folder: Path) -> str:
    """Return a text with the tables of the result files that it names brought up to date."""

    def section(match: re.Match[str]) -> str:
        path = folder / match["name"]
        if match["what"] in OTHER_SECTIONS:
            table = OTHER_SECTIONS[match["what"]](folder, match["name"])
        else:
            table = markdown_of_file(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")
        return f"<!-- {match['what']}: {match['name']} -->\n\n{table.strip()}\n\n<!-- end -->"

    pattern = rf"<!-- (?P<what>results|{'|'.join(OTHER_SECTIONS)}): (?P<name>\S+) -->.*?<!-- end -->"
    return re.sub(pattern, section, text, flags=re.DOTALL)


def pages() -> list[Path]:
    """Return every Markdown file that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(argv: Sequence[str]) -> None:
    """Print the tables of result files, and bring pages up to date: all of them if no file is named."""
    paths = [Path(argument) for argument in argv] or pages()
    for path in paths:
        if path.suffix == ".md":
            before = path.read_text(encoding="utf-8")
            if (after := with_results(before, RESULTS)) != before:
                write_text(path, after)
        else:
            print(markdown_of_file(path))


if __name__ == "__main__":
    main(sys.argv[1:])
