"""``trifuse ablate``: a paper's ablation table on a synthetic cohort, for each network that has one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.options import positive
from trifuse.architectures.runs.registry import experiments
from trifuse.architectures.storage.text import read_text

from .arguments import REPORTING, add_command, add_commands, given_values


def add_parser(commands: Any) -> None:
    """Add the command and its networks."""
    help = "train a paper's ablation table on a synthetic cohort"
    networks = add_commands(commands, "ablate", help, "networks", "NETWORK")
    for experiment in experiments():
        ablation = experiment.ablation
        if ablation is None:
            continue
        parser = add_command(networks, experiment.name, run, ablation.summary, (*REPORTING, *ablation.packages))
        parser.set_defaults(experiment=experiment)
        parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
        for name, what, default in (
            ("--seeds", "repetitions of each row", ablation.seeds),
            ("--epochs", "of each training", ablation.epochs),
            ("--cases", "of the phantom", ablation.cases),
        ):
            parser.add_argument(name, type=positive, help=f"{what} ({default})")
        for option in ablation.options:
            option.add_to(parser)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Train the table of a network and print it."""
    ablation = arguments.experiment.ablation
    further = given_values(arguments, ablation.options)
    sizes = {name: getattr(arguments, name) for name in ("seeds", "epochs", "cases")}
    table = arguments.experiment.load(ablation.run)(
        arguments.out,
        **{name: value for name, value in sizes.items() if value is not None},
        **further,
        command=argv,
    )
    print(read_text(table))
    print(f"table: {table}")
