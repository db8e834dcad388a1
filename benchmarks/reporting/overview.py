"""One line for each case and pass of every result file: what people write, the peers, and ours side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trifuse.kernels.testing.tables import table

OURS, COMPILED_OURS, COMPILED = "trifuse", "torch.compile of trifuse", "torch.compile"
HEADINGS = [
    "what",
    "pass",
    "as written",
    "compiled",
    "best peer",
    "trifuse",
    "speed-up",
    "trifuse compiled",
    "speed-up",
    "peak MiB",
]


def overview(folder: Path, kind: str) -> str:
    """Return a Markdown table of all result files of a kind of device in a folder, ``"cpu"`` or ``"cuda"``.

    Times are median milliseconds; a speed-up is the median of the rounds' ratios to what people write, the first form
    of its file; none where that form was refused. A peer is any other form; where there are several the fastest counts,
    by name. Peak memory is that of what people write, then that of ours.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*.{kind}.json"))]
    compared = [record for record in records if OURS in (row["provider"] for row in record.get("rows", ()))]
    lines = [line for record in compared for line in _lines(record)]
    return "\n".join(table(lines, HEADINGS))


def _lines(record: Mapping[str, Any]) -> Iterator[list[str]]:
    places = dict.fromkeys((row["case"], row["pass"]) for row in record["rows"])
    for case, timed in places:
        rows = [row for row in record["rows"] if (row["case"], row["pass"]) == (case, timed)]
        by_name = {row["provider"]: row for row in rows}
        written, ours, compiled_ours = (by_name.get(name) for name in (record["baseline"], OURS, COMPILED_OURS))
        others = [row for row in rows if not row["provider"].startswith(OURS) and row not in (written, compiled_ours)]
        compiled = [row for row in others if row["provider"].startswith(COMPILED)]
        peers = [row for row in others if row not in compiled]
        yield [
            f"{record['benchmark'].replace('_', ' ')}: {case}",
            timed,
            _ms(written),
            _ms(_fastest(compiled)),
            _named(_fastest(peers)),
            _ms(ours),
            _ratio(ours),
            _ms(compiled_ours),
            _ratio(compiled_ours),
            " → ".join(f"{row['peak_mib']:.3g}" for row in (written, ours) if row is not None),
        ]


def _fastest(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return min(rows, key=lambda row: row["median_ms"], default=None)


def _ms(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['median_ms']:,.0f}" if row["median_ms"] >= 1000 else f"{row['median_ms']:.3g}"


def _named(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{_ms(row)} ({row['provider']})"


def _ratio(row: Mapping[str, Any] | None) -> str:
    return "" if row is None or row["speedup"] is None else f"{row['speedup']:.2f}"
