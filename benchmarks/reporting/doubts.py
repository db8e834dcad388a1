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
    form of ours that launched no kernel, though it has some, a file that does not say whether kernels were forced and
    ran, and one that holds no measurement.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        return [f"{path.name}: it is no result file: it holds a {type(record).__name__} where an object is expected"]
    stamp = record.get("stamp") or {}
    fallbacks = stamp.get("fallbacks")
    found = [f"{op} fell back to plain PyTorch on {reason}" for op, reason in (fallbacks or {}).items()]
    if path.name.lower().endswith(".cuda.json"):
        if fallbacks is None:
            found.append("it does not say whether operators fell back to plain PyTorch")
        if stamp.get("backend") != "triton":
            found.append(f"its kernels were not forced: expected the backend triton, got {stamp.get('backend')}")
        if not record.get("rows") and not record.get("curves"):
            found.append("it holds no measurement")
        found += [f"{what} launched no kernel" for what in _without_launches(record)]
    return [f"{path.name}: {doubt}" for doubt in found]


def _without_launches(record: Mapping[str, Any]) -> Iterator[str]:
    for row in record.get("rows", ()):
        if record.get("kernels", True) and OURS in row["provider"] and not row.get("launches"):
            yield f"{row['provider']} ({row['case']}, {row['pass']})"
    for curve in record.get("curves", ()):
        launches = curve.get("launches", [])  # None for curves of what has no kernels
        if launches is not None and not (launches and all(launches)):
            yield f"{curve['name']} against {curve['axis']}"
