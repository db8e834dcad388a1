"""``trifuse probe``: which blocks of an encoder know where the targets of a cohort are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts.cohort_options import COHORT_OPTIONS
from trifuse.architectures.runs.options import OptionGroup, positive
from trifuse.architectures.runs.registry import experiments

from .arguments import COHORT, REPORTING, add_command, add_group, given_values, refuse_replacing
from .train import CASES

_SHARED = ("--split", "--val-cases", "--val-patients", "--test-cases", "--image-size", "--window", "--nonfinite")


def add_parser(commands: Any) -> None:
    """Add the command."""
    help = "tell which blocks of an encoder matter: learned weights, leaving one out, the best k"
    parser = add_command(commands, "probe", run, help, REPORTING)
    parser.add_argument("encoder", type=Path, help="folder of converted weights, or of a Hugging Face model")
    slices = tuple(option for option in CASES.options if option.flag in _SHARED)
    groups = [OptionGroup("cohort", (COHORT, *COHORT_OPTIONS)), OptionGroup("cases and slices", slices)]
    for group in groups:
        add_group(parser, group)
    parser.add_argument("--out", type=Path, required=True, help="folder for picture, table and features")
    parser.add_argument("--seeds", type=positive, default=5, help="from which weights are learned (%(default)s)")
    parser.add_argument("--steps", type=positive, default=300, help="of each (%(default)s)")
    help = "channels of a block that are looked at; of wider tokens, random projections (%(default)s)"
    parser.add_argument("--width", type=positive, default=64, help=help)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (%(default)s)")
    experiment = next(one for one in experiments() if one.probe)
    options = tuple(option for group in groups for option in group.options)
    parser.set_defaults(experiment=experiment, options=options)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Probe the encoder, and print what was found and where the picture and its table lie."""
    from trifuse.architectures.evaluation.block_probe_figure import NAME
    from trifuse.architectures.runs.recipes import recipe_from

    refuse_replacing(arguments.out, NAME)
    experiment = arguments.experiment
    recipe = recipe_from(experiment.load(experiment.recipe), None, given_values(arguments, arguments.options))
    picture = experiment.load(experiment.probe)(
        arguments.encoder,
        recipe.data,
        arguments.out,
        seeds=arguments.seeds,
        steps=arguments.steps,
        width=arguments.width,
        device=arguments.device,
    )
    print(f"{picture.alt}\npicture: {picture.png}\ntable:   {picture.csv}")
