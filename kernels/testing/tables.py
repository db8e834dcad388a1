"""The tables of a comparison, for a terminal and for a page of Markdown alike: only the columns that have values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# Heading, and how a row's cell is written; a column of empty cells is left out.
COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "form": lambda row: row["provider"],
    "median ms": lambda row: _digits(row["median_ms"], 3),
    "20–80 %": lambda row: f"{_digits(row['fifth_ms'], 3)}–{_digits(row['four_fifths_ms'], 3)}",
    "speed-up": lambda row: "" if row["speedup"] is None else f"{row['speedup']:.2f}",
    "peak MiB": lambda row: _digits(row["peak_mib"], 2),
    "saved MiB": lambda row: _digits(row["saved_mib"], 2),
    "GB/s": lambda row: _digits(row["gb_per_s"], 2),
    "GFLOP/s": lambda row: _digits(row["gflop_per_s"], 2),
    "of ceiling": lambda row: "" if row["of_ceiling"] is None else f"{row['of_ceiling']:.0%}",
    "launches": lambda row: str(row.get("launches") or ""),
}


def markdown(record: Mapping[str, Any]) -> str:
    """Return a result file's record as text: where it was measured, and a table for each case and pass."""
    machine = record["stamp"]
    where = (
        f"Measured on {machine['device']}, {threads(machine)}; {_ceilings(machine)}; "
        f"torch {machine['torch']}, commit {machine['commit']}. Medians of rounds in which all forms ran in turn, and "
        f"their 20th to 80th percentile; speed-ups are medians of the rounds' ratios to {record['baseline']}."
    )
    return "\n\n".join([where, *_refusal(machine), *_tables(record)]) + "\n"


def _refusal(machine: Mapping[str, Any]) -> Iterator[str]:
    fallbacks = [f"{op} on {reason}" for op, reason in machine.get("fallbacks", {}).items()]
    if fallbacks:
        yield f"**Kernels could not be built, and plain PyTorch took over: {'; '.join(fallbacks)}.**"


def _tables(record: Mapping[str, Any]) -> Iterator[str]:
    rows = [*record["rows"], *record["refused"]]
    places = {(row["case"], row["pass"]): None for row in rows}
    for case, timed in places:
        here = [row for row in rows if (row["case"], row["pass"]) == (case, timed)]
        yield f"**{case}, {timed}**"
        measured = [row for row in here if "reason" not in row]
        if measured:
            yield "\n".join(table([[cell(row) for cell in COLUMNS.values()] for row in measured], list(COLUMNS)))
        refused = [row for row in here if "reason" in row]
        if refused:
            yield "Refused: " + "; ".join(row["reason"].partition("\n")[0] for row in refused) + "."
    if record["absent"]:
        yield "Absent: " + "; ".join(f"{name} ({reason})" for name, reason in record["absent"].items()) + "."


def table(rows: list[list[str]], headings: list[str]) -> Iterator[str]:
    """Yield the lines of a Markdown table: columns aligned, the first to the left, those without a value left out."""
    kept = [index for index in range(len(headings)) if any(row[index] for row in rows)]
    widths = [max(len(line[index]) for line in (headings, *rows)) for index in kept]
    for line in (headings, None, *rows):
        if line is None:
            cells: Iterable[str] = (
                "-" * width if n == 0 else "-" * (width - 1) + ":" for n, width in enumerate(widths)
            )
        else:
            cells = (
                line[index].rjust(width) if n else line[index].ljust(width)
                for n, (index, width) in enumerate(zip(kept, widths, strict=True))
            )
        yield f"| {' | '.join(cells)} |"


def _digits(value: float | None, count: int) -> str:
    """Return a number with so many digits that count, within limits of what is worth reading; nothing for None."""
    if value is None:
        return ""
    places = count - 1 - math.floor(math.log10(value)) if value else 0
    return f"{value:.{min(max(0, places), count + 1)}f}"


def threads(machine: Mapping[str, Any]) -> str:
    """Return how many threads a stamp's machine computed with, in words."""
    return "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def _ceilings(machine: Mapping[str, Any]) -> str:
    products = [
        f"{name} products {machine[key]:,} GFLOP/s"
        for name, key in (("float32", "float32_gflop_per_s"), ("bfloat16", "bfloat16_gflop_per_s"))
        if machine[key]
    ]
    return ", ".join([f"copies {machine['copy_gb_per_s']} GB/s", *products])
