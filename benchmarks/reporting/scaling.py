"""How time and memory grow: with batch, image, maps, classes and tokens, and with a second process.

    python -m trifuse.benchmarks.reporting.scaling --out FOLDER [--seconds 0.5]

Each curve is one operator or training step at four or five sizes of one thing. All sizes are timed in turn, round after
round; each round gives an exponent, the slope of log time against log size by least squares, and the median of these is
the curve's, with the quintiles beside it. The folder gets ``scaling.<device>.json``, ``.md`` and ``.png``.

The last part trains a small U-Net as `trifuse train` does, alone and as two processes that exchange by gloo.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trifuse.architectures.storage.atomic_files import write_json, write_text
from trifuse.kernels.testing.counting import kernels_forced, launches_of
from trifuse.kernels.testing.machine import MIB, default_device, stamp
from trifuse.kernels.testing.measuring import measure
from trifuse.kernels.testing.tables import table, threads

from .scaling_curves import CURVES, TINY_CURVES, Curve
from .scaling_ranks import BATCH, SIDE, measure_processes


@dataclass(frozen=True)
class Measured:
    """A curve's medians, peaks and launches, one for each size; the exponents: median and quintiles over rounds."""

    name: str
    axis: str
    sizes: tuple[int, ...]
    median_ms: tuple[float, ...]
    peak_mib: tuple[float, ...]
    exponent: float
    exponent_low: float
    exponent_high: float
    last_exponent: float
    memory_exponent: float | None
    work: float | None
    rounds: int
    launches: tuple[int, ...] | None


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of log value against log size by least squares: p where the values are c * size**p."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure_curve(curve: Curve, device: torch.device, seconds: float) -> Measured:
    """Time all sizes of a curve in turn, ``seconds`` for each; on a GPU with our kernels forced, or refused."""
    with kernels_forced(device):
        works = {str(size): curve.make(size, device) for size in curve.sizes}
        launches = [launches_of(curve.name, work, device, expected=curve.kernels) for work in works.values()]
        timings = measure(works, device=device, seconds=seconds, **curve.few)
    in_order = [timings[str(size)] for size in curve.sizes]
    of_rounds = [exponent(curve.sizes, times) for times in zip(*(timing.seconds for timing in in_order), strict=True)]
    low, _, _, high = statistics.quantiles(of_rounds, n=5, method="inclusive")
    peaks = [timing.peak_bytes / MIB for timing in in_order]
    return Measured(
        name=curve.name,
        axis=curve.axis,
        sizes=curve.sizes,
        median_ms=tuple(round(timing.median * 1e3, 4) for timing in in_order),
        peak_mib=tuple(round(peak, 3) for peak in peaks),
        exponent=round(statistics.median(of_rounds), 3),
        exponent_low=round(low, 3),
        exponent_high=round(high, 3),
        last_exponent=round(
            statistics.median(
                exponent(curve.sizes[-2:], pair)
                for pair in zip(in_order[-2].seconds, in_order[-1].seconds, strict=True)
            ),
            3,
        ),
        memory_exponent=round(exponent(curve.sizes, peaks), 3) if min(peaks) > 0 else None,
        work=curve.work,
        rounds=len(of_rounds),
        launches=tuple(launches) if curve.kernels else None,
    )


# -------------------------------------------------------------------------------------------------------- the report


def markdown(record: Mapping[str, Any]) -> str:
    """Return a record as text: where it was measured, a table of the curves, and one of the processes."""
    machine = record["stamp"]
    lines = [
        f"Measured on {machine['device']}, {threads(machine)}; torch {machine['torch']}, commit "
        f"{machine['commit']}. Operators forward and backward, labels forward alone, steps without an optimiser. The "
        "exponent is the slope of log time against log size, median and 20th to 80th percentile over rounds in which "
        "all sizes ran in turn; between the two largest sizes; and that of the peak memory.",
        "",
    ]
    rows = [
        [
            curve["name"],
            curve["axis"],
            ", ".join(map(str, curve["sizes"])),
            ", ".join(f"{value:.3g}" for value in curve["median_ms"]),
            f"{curve['exponent']:.2f} ({curve['exponent_low']:.2f} to {curve['exponent_high']:.2f})",
            f"{curve['last_exponent']:.2f}",
            "" if curve["memory_exponent"] is None else f"{curve['memory_exponent']:.2f}",
            "" if curve["work"] is None else f"{curve['work']:.0f}",
        ]
        for curve in record["curves"]
    ]
    headings = ["computation", "against", "sizes", "median ms", "exponent", "at the end", "memory", "of the work"]
    lines += table(rows, headings)
    if record["processes"]:
        lines += [
            "",
            f"Training steps of a plain U-Net of 16 channels as `trifuse train` runs them, {BATCH} images of {SIDE} x "
            f"{SIDE} in all, on {machine['cpus']} logical processors:",
            "",
        ]
        cells = [
            [str(p["processes"]), str(p["threads"]), f"{p['samples_per_s']:.1f}", f"{p['speedup']:.2f}"]
            for p in record["processes"]
        ]
        lines += table(cells, ["processes", "threads of each", "images per second", "against the first"])
    return "\n".join(lines) + "\n"


# Okabe and Ito's colours and two of Tol's, told apart with any colour vision; the marker says the same.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
    ("#7F7F7F", "*"),
    ("#882255", "<"),
    ("#44AA99", ">"),
)
LINES = ("-", "--", ":", "-.")  # of the curves of one computation
OTHERS = "number of what the legend names"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw time and peak memory against what grows, one column for each thing that grows."""
    from matplotlib.figure import Figure

    curves = record["curves"]
    names = list(dict.fromkeys(curve["name"] for curve in curves))
    axes_of = {"batch": "batch (samples)", "pixels": "pixels of the image or map"}
    groups = list(dict.fromkeys(axes_of.get(curve["axis"], OTHERS) for curve in curves))
    figure = Figure(figsize=(5.2 * len(groups), 8.4), layout="constrained")
    panels = figure.subplots(2, len(groups), squeeze=False, sharex="col")
    for curve in curves:
        column = groups.index(axes_of.get(curve["axis"], OTHERS))
        colour, marker = STYLES[names.index(curve["name"]) % len(STYLES)]
        own_axes = [other["axis"] for other in curves if other["name"] == curve["name"]]
        line = LINES[own_axes.index(curve["axis"]) % len(LINES)]
        what = curve["name"] if curve["axis"] in axes_of else f"{curve['name']}, {curve['axis']}"
        for panel, values, power in (
            (panels[0, column], curve["median_ms"], curve["exponent"]),
            (panels[1, column], curve["peak_mib"], curve["memory_exponent"]),
        ):
            if power is not None:
                panel.plot(curve["sizes"], values, line, color=colour, marker=marker, label=f"{what}: {power:.2f}")
    for column, group in enumerate(groups):
        for panel, unit in ((panels[0, column], "time (ms)"), (panels[1, column], "peak memory (MiB)")):
            sizes = sorted({size for line in panel.get_lines() for size in line.get_xdata()})
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(_spread(sizes), labels=[str(size) for size in _spread(sizes)])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.set_ylabel(unit)
            panel.tick_params(axis="x", labelrotation=45)
            panel.legend(title="exponent", fontsize="small", framealpha=0.5)
        panels[1, column].set_xlabel(group)
    machine = record["stamp"]
    figure.suptitle(f"Time and memory against size; {machine['device']}, {threads(machine)}, both axes log")
    figure.savefig(path, dpi=100)


def _spread(sizes: Sequence[int]) -> list[int]:
    """Return the sizes that have room for a label beside each other on a logarithmic axis."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size >= 1.7 * kept[-1]:
            kept.append(size)
    return kept


def run(out: Path, seconds: float, *, curves: Sequence[Curve] = CURVES, rounds: int = 3) -> dict[str, Any]:
    """Measure the curves and, ``rounds`` times, the processes; write the three files, the picture with matplotlib."""
    device = default_device()
    record: dict[str, Any] = {"benchmark": "scaling", "stamp": {**stamp(device), "cpus": os.cpu_count()}}
    record |= {"curves": [], "processes": []}
    for curve in curves:
        record["curves"].append(asdict(measure_curve(curve, device, seconds)))
        print(f"{curve.name} against {curve.axis}: exponent {record['curves'][-1]['exponent']:.2f}", flush=True)
        write(record, out, device)  # a run that is ended keeps what it has
    if rounds:
        record["processes"] = measure_processes(4 * seconds, rounds)
        write(record, out, device)
    if importlib.util.find_spec("matplotlib"):
        draw(record, out / f"scaling.{device.type}.png")
    else:
        print("no picture, for matplotlib is not installed; run: pip install 'trifuse[med]'")
    return record


def write(record: Mapping[str, Any], out: Path, device: torch.device) -> None:
    """Write a record as JSON and as a page."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"scaling.{device.type}.json", record)
    write_text(out / f"scaling.{device.type}.md", markdown(record))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure how time and memory grow")
    parser.add_argument("--out", type=Path, default=Path("scaling"), help="folder for the three files")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to spend on each point")
    parser.add_argument("--tiny", action="store_true", help="small sizes alone, to see that everything runs")
    options = parser.parse_args(argv)
    curves, rounds = (TINY_CURVES, 1) if options.tiny else (CURVES, 3)
    print(markdown(run(options.out, options.seconds, curves=curves, rounds=rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
