"""The ten rows that the README shows: what fusing gains, a training step, and a case that is slower than plain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .overview import COMPILED_OURS, OURS

BOTH = "forward + backward"
# benchmark, case and pass of each row, as the result files name them
ROWS = (
    ("weighted_block_fusion", "DINO U-Net base, 12x(2,1025,768) float32", "forward"),
    ("weighted_block_fusion", "DINO U-Net base, 12x(2,1025,768) float32", "forward + backward, trained maps"),
    ("dilated_attention", "DilateFormer stage 1, (2,64,64,3x72) float32", BOTH),
    ("context_aware_fusion", "FIAS stage of 72 channels, batch 2, 64 x 64 float32", BOTH),
    ("depthwise_multi_kernel", "FIAS (2,72,64,64) NCHW float32", BOTH),
    ("temporal_film_gate", "TAFF-UNet stage 3, (8, 256, 32, 32) float32", BOTH),
    ("mutation_loss", "FIAS heads, (2,9,16/32/64) float32", BOTH),
    ("upsample_argmax", "FIAS, 2 x 9 classes, 16 + 32 + 64 to 256", "labels"),
    ("fias_training_step", "FIAS tiny, (1,1,224,224), 9 classes, float32", "forward, loss and backward"),
    ("channel_gate", "FIAS decoder, (2, 72, 64, 64) float32", BOTH),
)
HEADINGS = (
    "what",
    "pass",
    "as written, ms",
    "best other, ms",
    "trifuse, ms",
    "trifuse compiled, ms",
    "speed-up",
    "peak MiB",
)


def highlights(folder: Path, kind: str) -> str:
    """Return a Markdown table of `ROWS`, from the result files of a kind of device, ``"cpu"`` or ``"cuda"``.

    The best other form is the fastest one that is neither what people write nor ours: a peer, or what
    ``torch.compile`` makes of the plain form. Peak memory is that of what people write, then that of ours.

    Raises:
        FileNotFoundError: a benchmark has no result file.
        KeyError: a result file has no such case and pass, or does not compare ours with what people write.
    """
    lines = [HEADINGS, ("---", "---", *["---:"] * 6)]
    for benchmark, case, timed in ROWS:
        record = json.loads((folder / f"{benchmark}.{kind}.json").read_text(encoding="utf-8"))
        what = f"`{benchmark}`: {case.removesuffix('float32').rstrip(' ,')}"
        lines.append((what, timed, *_numbers(record, case, timed)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(record: Mapping[str, Any], case: str, timed: str) -> tuple[str, ...]:
    rows = {row["provider"]: row for row in record["rows"] if (row["case"], row["pass"]) == (case, timed)}
    if not {record["baseline"], OURS} <= rows.keys():
        raise KeyError(f"{record['benchmark']}: no row of {OURS!r} and {record['baseline']!r} for {case}, {timed}")
    written, ours = rows[record["baseline"]], rows[OURS]
    others = [row for name, row in rows.items() if row is not written and OURS not in name]
    best, compiled = min(others, key=lambda row: row["median_ms"], default=None), rows.get(COMPILED_OURS)
    times = ["" if row is None else _three_digits(row["median_ms"]) for row in (written, best, ours, compiled)]
    memory = " → ".join(_three_digits(row["peak_mib"]) for row in (written, ours))
    return (*times, f"{ours['speedup']:.2f}", memory)


def _three_digits(value: float) -> str:
    return f"{value:.3g}"
