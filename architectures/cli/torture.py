"""``trifuse torture``: kill, damage and signal real training runs, and check that they resume to the same bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.options import positive
from trifuse.architectures.runs.registry import experiments
from trifuse.architectures.runs.torture_blows import KINDS

from .arguments import REPORTING, add_command


def add_parser(commands: Any) -> None:
    """Add the command."""
    help = "kill small training runs at random and check that they resume to the same bits"
    parser = add_command(commands, "torture", run, help, REPORTING)
    networks = [experiment.name for experiment in experiments() if experiment.quick]
    parser.add_argument("--out", type=Path, required=True, help="folder to write into, new or empty")
    parser.add_argument("--kills", type=positive, default=20, metavar="N", help="blows, at least (%(default)s)")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="M", help="how long, at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what happens (%(default)s)")
    help = "what happens to the runs (all)"
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), help=help)
    parser.add_argument("--network", choices=networks, default=networks[-1], help="what is trained (%(default)s)")


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Torture runs; return 5 if one of them did not end as it must."""
    from functools import partial

    from trifuse.architectures.runs.torture import torture
    from trifuse.architectures.runs.torture_page import headline, machine_of_runs, summary, write_torture

    machine = machine_of_runs()
    done = torture(
        arguments.out,
        arguments.network,
        kills=arguments.kills,
        minutes=arguments.minutes,
        seed=arguments.seed,
        kinds=arguments.kinds,
        say=partial(print, flush=True),
        keep=partial(write_torture, arguments.out, machine=machine),
    )
    print(f"\n{summary(done)}\n\n{headline(done)}\nreport: {write_torture(arguments.out, done, machine)}")
    return 5 if done.failures else 0
