"""The table of the versions of torch and Triton that the tests were run with."""

from __future__ import annotations

from trifuse.kernels.tested_versions import VERSIONS, read_verdicts

COLUMNS = ("torch", "triton", "others", "python", "numpy", "passed", "failed", "skipped", "commit", "date")


def versions_table() -> str:
    """Return a Markdown table with one row for each pair of torch and Triton, and for the bounds of other packages."""
    rows = [[verdict[column] for column in COLUMNS] for verdict in read_verdicts(VERSIONS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, ("---",) * len(COLUMNS), *rows))
