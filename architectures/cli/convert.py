"""``trifuse convert``: published weights in the formats that the networks read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.registry import experiments

from .arguments import add_command, add_commands, refuse_existing


def add_parser(commands: Any) -> None:
    """Add the command and its formats."""
    formats = add_commands(commands, "convert", "bring published weights into trifuse's format", "formats", "FORMAT")
    for experiment in experiments():
        for converter in experiment.converters:
            parser = add_command(formats, converter.name, run, converter.summary)
            parser.set_defaults(experiment=experiment, converter=converter)
            parser.add_argument("file", type=Path, help=".pth or .safetensors")
            parser.add_argument("--out", type=Path, help="folder to write (the file's name without its ending)")
            help = "replace what an earlier conversion left there"
            parser.add_argument("--overwrite", action="store_true", help=help)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Convert a file of weights and print what it was."""
    from trifuse.architectures.storage.published_weights import is_conversion

    out = arguments.out or arguments.file.with_suffix("")
    replaceable = is_conversion if arguments.overwrite else None
    for name in ("config.json", "model.safetensors"):
        refuse_existing(out / name, "an earlier conversion", replaceable)
    print(arguments.experiment.load(arguments.converter.run)(arguments.file, out))
    print(f"weights: {out}")
