"""``trifuse bench``: time every operator and network on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.options import duration
from trifuse.kernels import OPERATORS

from .arguments import add_command

TOOLS = ("host_cost", "scaling")  # parts of the report that are no benchmark file


def add_parser(commands: Any) -> None:
    """Add the command."""
    help = "time every operator and network on this machine, and write a report"
    parser = add_command(commands, "bench", run, help, ("pytest_benchmark",))
    parser.add_argument("--out", type=Path, required=True, help="folder for the report, the result files and the logs")
    names = part_names()
    help = f"what to time (all): {', '.join(names)}; an operator's name stands for the part that times it"
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted({*names, *OPERATORS}), help=help)
    parser.add_argument("--seconds", type=duration, default=0.5, help="for each form of a computation (%(default)s)")


def part_names() -> list[str]:
    """Return the parts of the report, by the files of the benchmarks, which are not imported."""
    spec = importlib.util.find_spec("trifuse.benchmarks")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in Path(folder).glob("bench_*.py")]
    return sorted([*(file.stem.removeprefix("bench_") for file in files), *TOOLS])


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run the benchmarks in a process of their own, and return its exit code."""
    only = ["--only", *arguments.only] if arguments.only else []
    command = [sys.executable, "-m", "trifuse.benchmarks.reporting.report", "--out", str(arguments.out), *only]
    return subprocess.run([*command, "--seconds", str(arguments.seconds)]).returncode
