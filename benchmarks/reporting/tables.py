"""Turn result files into the Markdown tables that the README shows.

    python benchmarks/reporting/tables.py                     # write them into README.md
    python benchmarks/reporting/tables.py RESULT.json ...     # print them

The README takes a result file in where it says ``<!-- results: NAME -->``, up to ``<!-- end -->``, and one line for
each case and pass of all files of a kind of device where it says ``<!-- overview: cpu -->``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from trifuse.architectures.storage.atomic_files import write_text
from trifuse.kernels.testing.tables import markdown

from .highlights import highlights
from .overview import overview

ROOT = Path(__file__).resolve().parents[2]
OF_A_DEVICE = {"overview": overview, "highlights": highlights}


def markdown_of_file(path: Path) -> str:
    """Return a result file as text."""
    return markdown(json.loads(path.read_text(encoding="utf-8")))


def with_results(text: str, folder: Path) -> str:
    """Return a text with the tables of the result files that it names brought up to date."""

    def section(match: re.Match[str]) -> str:
        path = folder / match["name"]
        if match["what"] in OF_A_DEVICE:
            table = OF_A_DEVICE[match["what"]](folder, match["name"])
        else:
            table = markdown_of_file(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")
        return f"<!-- {match['what']}: {match['name']} -->\n\n{table.strip()}\n\n<!-- end -->"

    pattern = r"<!-- (?P<what>results|overview|highlights): (?P<name>\S+) -->.*?<!-- end -->"
    return re.sub(pattern, section, text, flags=re.DOTALL)


def main(paths: list[str]) -> None:
    """Print the tables of the result files; without any, bring the README up to date."""
    for path in paths:
        print(markdown_of_file(Path(path)))
    if not paths:
        readme = ROOT / "README.md"
        write_text(readme, with_results(readme.read_text(encoding="utf-8"), ROOT / "benchmarks" / "results"))


if __name__ == "__main__":
    main(sys.argv[1:])
