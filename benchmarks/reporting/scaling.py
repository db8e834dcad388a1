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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trifuse.architectures.storage.atomic_files import write_json, write_text
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.kernels import (
    depthwise_multi_kernel,
    dilated_attention,
    memory_efficient_attention,
    mutation_loss,
    temporal_film_gate,
    upsample_argmax,
    weighted_block_fusion,
)
from trifuse.kernels.testing.counting import kernels_forced, launches_of
from trifuse.kernels.testing.machine import MIB, default_device, stamp
from trifuse.kernels.testing.measuring import measure
from trifuse.kernels.testing.tables import table, threads

from .scaling_ranks import BATCH, SIDE, measure_processes

Work = Callable[[], object]


@dataclass(frozen=True)
class Curve:
    """One computation at several sizes of one thing.

    Args:
        name: the operator or network, and what of it is timed.
        axis: what grows.
        sizes: how large it is; the exponent is over these.
        make: prepares the computation at a size.
        work: the exponent of its arithmetic, None where it lies between two.
        kernels: whether it must launch Triton kernels of ours on a GPU.
    """

    name: str
    axis: str
    sizes: tuple[int, ...]
    make: Callable[[int, torch.device], Work]
    work: float | None = 1.0
    kernels: bool = True


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
        timings = measure(works, device=device, seconds=seconds)
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


# -------------------------------------------------------------------------------------------------------- the curves


def normal(*shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device)


def forward_and_backward(function: Callable[..., Tensor], *arguments: Any, leaves: Sequence[Tensor]) -> Work:
    """Return a call of ``function`` and of its gradients, for an incoming gradient that is already there."""
    for leaf in leaves:
        leaf.requires_grad_(True)
    with torch.no_grad():
        incoming = torch.ones_like(function(*arguments))
    return lambda: torch.autograd.grad(function(*arguments), leaves, incoming)


def fusion(maps: int, batch: int, device: torch.device) -> Work:
    features = [normal(batch, 1024, 384, device=device) for _ in range(maps)]
    logits = normal(maps, device=device)
    return forward_and_backward(weighted_block_fusion, features, logits, leaves=[logits])


def dilated(side: int, batch: int, dilations: int, device: torch.device) -> Work:
    q, k, v = (normal(batch, side, side, 24 * dilations, device=device) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dilated_attention(q, k, v, num_heads=dilations, dilations=range(1, dilations + 1))

    return forward_and_backward(attend, q, k, v, leaves=[q, k, v])


def depthwise(side: int, device: torch.device) -> Work:
    x = normal(2, 72, side, side, device=device)
    weights = [normal(72, 1, kernel, kernel, device=device) / kernel for kernel in (5, 7)]
    return forward_and_backward(depthwise_multi_kernel, x, weights, leaves=[x, *weights])


def film(side: int, device: torch.device) -> Work:
    features, ecg, weights, gamma, beta = (
        normal(*shape, device=device) for shape in ((4, 128, side, side), (4, 128), (4, 2), (4, 128), (4, 128))
    )
    tensors = [features, ecg, weights, gamma, beta]
    return forward_and_backward(temporal_film_gate, *tensors, leaves=tensors)


def subsets(side: int, maps: int, classes: int, device: torch.device) -> Work:
    logits = [normal(1, classes, side, side, device=device) for _ in range(maps)]
    generator = torch.Generator(device).manual_seed(0)
    target = torch.randint(classes, (1, side, side), generator=generator, device=device)
    # all non-empty subsets, 2**maps - 1 of them
    return forward_and_backward(lambda *maps: mutation_loss(list(maps), target), *logits, leaves=logits)


def labels(side: int, device: torch.device) -> Work:
    maps = [normal(2, 9, side // step, side // step, device=device) for step in (16, 8, 4)]
    return lambda: upsample_argmax(maps, (side, side))


def attention(tokens: int, device: torch.device) -> Work:
    q, k, v = (normal(1, tokens, 6, 64, device=device) for _ in range(3))
    return lambda: memory_efficient_attention(q, k, v)


def plain_step(side: int, batch: int, device: torch.device) -> Work:
    from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig

    network = PlainUNet(PlainUNetConfig(num_classes=4, image_size=256, base_dim=8, num_stages=4)).to(device).train()
    image = normal(batch, 1, side, side, device=device)
    target = torch.zeros(batch, side, side, dtype=torch.int64, device=device)
    loss, parameters = SegmentationLoss(), list(network.parameters())
    batch_of = {"target": target}
    return lambda: torch.autograd.grad(loss(network(image), batch_of, None), parameters, allow_unused=True)


def fias_step(batch: int, device: torch.device) -> Work:
    from trifuse.architectures.fias import Fias, FiasConfig

    network = Fias(FiasConfig(variant="nano", num_classes=5)).to(device).train()
    image = normal(batch, 1, 64, 64, device=device)
    target = torch.zeros(batch, 64, 64, dtype=torch.int64, device=device)
    parameters = list(network.parameters())

    def step() -> object:
        torch.manual_seed(0)
        return torch.autograd.grad(mutation_loss(network(image), target), parameters, allow_unused=True)

    return step


def dino_labels(side: int, device: torch.device) -> Work:
    from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig

    network = DinoUNet(DinoUNetConfig(variant="tiny", pos_mode="size", stream_fusion=True)).to(device).eval()
    image = normal(1, 3, side, side, device=device)
    return torch.no_grad()(lambda: network(image))


def squares(*sides: int) -> tuple[int, ...]:
    """Return the numbers of pixels of square images."""
    return tuple(side**2 for side in sides)


def of_side(make: Callable[..., Work], *others: int) -> Callable[[int, torch.device], Work]:
    """Return what prepares a computation on a square image of so many pixels, given what does so for its side."""
    return lambda pixels, device: make(isqrt(pixels), *others, device)


CURVES = (
    Curve("block fusion", "batch", (1, 2, 4, 8), lambda size, device: fusion(12, size, device)),
    Curve("block fusion", "maps N", (3, 6, 12, 24), lambda size, device: fusion(size, 1, device)),
    Curve("dilated attention", "batch", (1, 2, 4, 8), lambda size, device: dilated(32, size, 3, device)),
    Curve("dilated attention", "pixels", squares(16, 32, 64, 96), of_side(dilated, 1, 3)),
    Curve("dilated attention", "dilations", (1, 2, 4, 8), lambda size, device: dilated(32, 1, size, device)),
    Curve("depthwise kernels", "pixels", squares(16, 32, 64, 96), of_side(depthwise)),
    Curve("temporal FiLM gate", "pixels", squares(16, 32, 64, 96), of_side(film)),
    Curve("MUTATION loss", "pixels", squares(48, 96, 160, 256), of_side(subsets, 3, 9)),
    Curve("MUTATION loss", "classes", (2, 4, 8, 16), lambda size, device: subsets(128, 3, size, device)),
    Curve("MUTATION loss", "subsets", (1, 3, 7, 15), lambda size, device: subsets(128, size.bit_length(), 9, device)),
    Curve("labels", "pixels", squares(64, 128, 256, 384), of_side(labels)),
    Curve("attention", "tokens", (128, 256, 512, 1024, 2048), attention, None, kernels=False),
    Curve("plain U-Net, step", "batch", (1, 2, 4, 8), lambda size, device: plain_step(64, size, device)),
    Curve("plain U-Net, step", "pixels", squares(32, 64, 96, 160), of_side(plain_step, 1)),
    Curve("FIAS, step", "batch", (1, 2, 4, 8), fias_step),
    Curve("DINO U-Net, labels", "pixels", squares(112, 168, 224, 280), of_side(dino_labels), None),
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
    options = parser.parse_args(argv)
    print(markdown(run(options.out, options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
