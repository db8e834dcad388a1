"""``trifuse ablate``: a paper's ablation table on a synthetic cohort, for each network that has one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.options import positive
from trifuse.architectures.runs.registry import experiments

from .arguments import add_command, add_commands


def add_parser(commands: Any) -> None:
    """Add the command and its networks."""
    help = "train a paper's ablation table on a synthetic cohort"
    networks = add_commands(commands, "ablate", help, "networks", "NETWORK")
    for experiment in experiments():
        ablation = experiment.ablation
        if ablation is None:
            continue
        parser = add_command(networks, experiment.name, run, ablation.summary)
        parser.set_defaults(experiment=experiment)
        parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
        parser.add_argument("--seeds", type=positive, default=3, help="repetitions of each row (%(default)s)")
        parser.add_argument("--epochs", type=positive, default=ablation.epochs, help="of each training (%(default)s)")
        parser.add_argument("--cases", type=positive, default=ablation.cases, help="of the phantom (%(default)s)")
        for option in ablation.options:
            option.add_to(parser)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Train the table of a network and print it."""
    ablation = arguments.experiment.ablation
    table = arguments.experiment.load(ablation.run)(
        arguments.out,
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        cases=arguments.cases,
        command=argv,
        **{option.field: getattr(arguments, option.name) for option in ablation.options},
    )
    print(table.read_text())
    print(f"table: {table}")
