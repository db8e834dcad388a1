"""Why a result file does not show what it seems to: figures of ours from a GPU on which no kernel of ours ran."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OURS = "trifuse"


def doubts(path: Path) -> list[str]:
    """Return what is doubtful about a result file, in words; nothing for one that is sound.

    On any device that is an operator whose kernels could not be built. On a GPU (``<name>.cuda.json``) it is also a
    form of ours that launched no kernel, though it has some, and a file that does not say whether kernels ran.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    stamp = record.get("stamp", {})
    found = [f"{op} fell back to plain PyTorch on {reason}" for op, reason in stamp.get("fallbacks", {}).items()]
    if path.name.endswith(".cuda.json"):
        if "fallbacks" not in stamp:
            found.append("it does not say whether operators fell back to plain PyTorch")
        found += [f"{what} launched no kernel" for what in _without_launches(record)]
    return [f"{path.name}: {doubt}" for doubt in found]


def _without_launches(record: Mapping[str, Any]) -> Iterator[str]:
    for row in record.get("rows", ()):
        if record.get("kernels", True) and OURS in row["provider"] and not row.get("launches"):
            yield f"{row['provider']} ({row['case']}, {row['pass']})"
    for curve in record.get("curves", ()):
        launches = curve.get("launches", [0])
        if launches is not None and not all(launches):
            yield f"{curve['name']} against {curve['axis']}"
