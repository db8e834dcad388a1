"""Training steps of a small U-Net, alone and as several processes that exchange by gloo, as `trifuse train` runs them.

Each setup runs in processes of its own, which are this file as a program::

    RANK=0 WORLD_SIZE=1 python benchmarks/reporting/scaling_ranks.py --out FILE.json --seconds 2
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig
from trifuse.architectures.storage.atomic_files import write_json
from trifuse.architectures.training.batches import Batches
from trifuse.architectures.training.distributed import open_world
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.architectures.training.parameter_groups import make_groups
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.step import TrainingStep, forward_image


@dataclass(frozen=True)
class Setup:
    """So many processes, each with so many threads."""

    processes: int
    threads: int


SETUPS = (Setup(1, 2), Setup(1, 1), Setup(2, 1))
BATCH, SIDE, SAMPLES = 8, 64, 64


class Phantoms(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images of noise and labels of zeros: loading them costs next to nothing."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(key[2])
        image = torch.randn(1, SIDE, SIDE, generator=generator)
        return {"image": image, "target": torch.zeros(SIDE, SIDE, dtype=torch.int64)}


def train_as_a_rank(seconds: float) -> float:
    """Train a small U-Net as one of the ranks that the environment names; return samples per second, all ranks'."""
    with open_world("cpu") as world, tempfile.TemporaryDirectory() as scratch:
        network = PlainUNet(PlainUNetConfig(num_classes=4, image_size=SIDE, base_dim=16)).train()
        recipe = Recipe(epochs=1, batch_size=BATCH, lr=1e-3, precision="fp32", device="cpu")
        batches = Batches(Phantoms(), recipe, world)
        step = TrainingStep(
            network,
            forward_image,
            SegmentationLoss(),
            make_groups(network, recipe, None),
            None,
            recipe,
            world,
            steps_per_epoch=batches.steps_per_epoch,
            crash_folder=Path(scratch),
            say=print,
        )
        loaded = list(batches.epoch(0))
        times: list[float] = []
        started = time.monotonic()
        while not world.any(len(times) > 3 and time.monotonic() - started > seconds):
            begun = time.perf_counter()
            step(loaded[len(times) % len(loaded)], len(times) % len(loaded))
            times.append(time.perf_counter() - begun)
        return BATCH / statistics.median(times[1:])


def run_ranks(setup: Setup, seconds: float) -> float:
    """Return the samples per second of a setup, from processes of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(setup.processes)}
        threads = {"OMP_NUM_THREADS": str(setup.threads), "MKL_NUM_THREADS": str(setup.threads)}
        ranks = []
        for rank in range(setup.processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", __spec__.name, "--out", str(Path(scratch) / f"{rank}.json"), "--seconds"]
            ranks.append(subprocess.Popen([*command, str(seconds)], env={**os.environ, **meeting, **threads, **own}))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"{setup.processes} ranks ended with {codes}; see above")
        return float(json.loads((Path(scratch) / "0.json").read_text())["samples_per_s"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure_processes(seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Time the setups in turn; speed-ups are medians of the rounds' ratios to the first setup."""
    found: dict[Setup, list[float]] = {setup: [] for setup in SETUPS}
    for _ in range(rounds):
        for setup in SETUPS:
            found[setup].append(run_ranks(setup, seconds))
    return [
        {
            **asdict(setup),
            "samples_per_s": round(statistics.median(rates), 2),
            "speedup": round(statistics.median(a / b for a, b in zip(rates, found[SETUPS[0]], strict=True)), 3),
            "rounds": rounds,
        }
        for setup, rates in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="train as the rank that the environment names, and say how fast")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the samples per second")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to train")
    options = parser.parse_args(argv)
    write_json(options.out, {"samples_per_s": train_as_a_rank(options.seconds)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
