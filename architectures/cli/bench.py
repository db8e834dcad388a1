"""``trifuse bench``: time every operator and network on this machine."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from .arguments import add_command


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "bench", run, "time every operator and network on this machine, and write a report")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report, the result files and the logs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="operators and networks to time (all)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each form of a computation (%(default)s)")


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run the benchmarks in a process of their own, and return its exit code."""
    from importlib.util import find_spec

    from trifuse.kernels import MissingExtra

    if find_spec("pytest_benchmark") is None:
        raise MissingExtra("pytest-benchmark", "bench", "timing this machine")
    only = ["--only", *arguments.only] if arguments.only else []
    command = [sys.executable, "-m", "trifuse.benchmarks.reporting.report", "--out", str(arguments.out), *only]
    return subprocess.run([*command, "--seconds", str(arguments.seconds)]).returncode
