"""Turn result files into the Markdown tables that the README shows.

    python benchmarks/tables.py                     # write them into README.md
    python benchmarks/tables.py RESULT.json ...     # print them

The README takes a result file in where it says ``<!-- results: NAME -->``, up to ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from trifuse.architectures.files import write_text

ROOT = Path(__file__).resolve().parents[1]


def markdown(record: dict[str, Any]) -> str:
    """Return a result file as text: where it was measured, and a table for each case and pass."""
    stamp = record["stamp"]
    where = (
        f"Measured on {stamp['device']}, {_threads(stamp['threads'])}, copying {stamp['copy_gb_per_s']} GB/s; "
        f"torch {stamp['torch']}, commit {stamp['commit']}. Medians of rounds in which all forms ran in turn; "
        f"speed-ups are medians of the rounds' ratios to {record['baseline']}."
    )
    return "\n\n".join([where, *_tables(record["rows"])]) + "\n"


def markdown_of_file(path: Path) -> str:
    """Return a result file as text; see `markdown`."""
    return markdown(json.loads(path.read_text(encoding="utf-8")))


def _tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    for (case, timed), group in groupby(rows, key=lambda row: (row["case"], row["pass"])):
        yield f"**{case}, {timed}**\n\n" + "\n".join(_lines(list(group)))


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    with_bandwidth = any(row["gb_per_s"] is not None for row in rows)
    yield _line(["form", "median ms", "speed-up", "peak MiB", *(["GB/s"] if with_bandwidth else [])])
    yield _line(["---", *["---:"] * (3 + with_bandwidth)])
    for row in rows:
        bandwidth = [f"{row['gb_per_s']:.0f}"] if with_bandwidth else []
        yield _line(
            [row["provider"], f"{row['median_ms']:.3g}", f"{row['speedup']:.2f}", f"{row['peak_mib']:.0f}", *bandwidth]
        )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def with_results(text: str, folder: Path) -> str:
    """Return a text with the tables of the result files that it names brought up to date."""

    def section(match: re.Match[str]) -> str:
        path = folder / match["name"]
        table = markdown_of_file(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")
        return f"<!-- results: {match['name']} -->\n\n{table.strip()}\n\n<!-- end -->"

    return re.sub(r"<!-- results: (?P<name>\S+) -->.*?<!-- end -->", section, text, flags=re.DOTALL)


def main(paths: list[str]) -> None:
    """Print the tables of the result files; without any, bring the README up to date."""
    for path in paths:
        print(markdown_of_file(Path(path)))
    if not paths:
        readme = ROOT / "README.md"
        write_text(readme, with_results(readme.read_text(encoding="utf-8"), ROOT / "benchmarks" / "results"))


if __name__ == "__main__":
    main(sys.argv[1:])
