"""``trifuse demo``: the whole way on a synthetic cohort, for each network that has one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.registry import experiments

from .arguments import add_command, add_commands, given_values


def add_parser(commands: Any) -> None:
    """Add the command and its networks."""
    help = "train, predict and report on a synthetic cohort, in minutes on a CPU"
    networks = add_commands(commands, "demo", help, "networks", "NETWORK")
    for experiment in experiments():
        if experiment.demo is None:
            continue
        parser = add_command(networks, experiment.name, run, experiment.demo.summary)
        parser.set_defaults(experiment=experiment)
        folder = Path("demo") / experiment.name
        parser.add_argument("--out", type=Path, default=folder, help="folder to write to (%(default)s)")
        parser.add_argument("--seed", type=int, default=0, help="of the phantom and of training (%(default)s)")
        parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in the folder")
        for option in experiment.demo.options:
            option.add_to(parser)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Run a network's demo."""
    demo = arguments.experiment.demo
    run_demo = arguments.experiment.load(demo.run)
    further = given_values(arguments, demo.options)
    run_demo(arguments.out, seed=arguments.seed, overwrite=arguments.overwrite, **further, command=argv)
