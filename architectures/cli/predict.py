"""``trifuse predict``: segment volumes with a trained network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts.cohort_options import FRAME
from trifuse.architectures.runs.options import memory_size, positive

from .arguments import NONFINITE, add_command


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "predict", run, "segment volumes with a trained network, on their native grid")
    parser.add_argument("model", type=Path, help="folder of a run, or of a saved network")
    parser.add_argument("images", type=Path, help="a NIfTI file, a folder of them, or a cohort")
    parser.add_argument("--out", type=Path, required=True, help="folder for <case>.nii.gz")
    parser.add_argument("--image-size", type=positive, help="side of the network's input in pixels (the run's)")
    help = "clip intensities to LOW..HIGH and scale them to [0, 1], in place of the run's scaling"
    parser.add_argument("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help=help)
    help = "for networks with an anatomical prior: folder of <case>.nii.gz to build it from"
    parser.add_argument("--prior-labels", type=Path, help=help)
    help = "mm, for a network on patches without a run"
    parser.add_argument("--spacing", nargs=2, type=float, metavar=("ROWS", "COLUMNS"), help=help)
    parser.add_argument("--frame", type=int, metavar="NUMBER", help=FRAME.help)
    parser.add_argument("--batch-size", type=positive, default=8, help="slices at a time (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (%(default)s)")
    help = "memory that the command may take, such as 4G or 500M; a case that needs more is refused before any begins"
    parser.add_argument("--max-ram", type=memory_size, metavar="SIZE", help=help)
    help = "how to treat NaN and infinite voxels (%(default)s)"
    parser.add_argument("--nonfinite", choices=NONFINITE, default="error", help=help)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Write label maps, and print how many."""
    from trifuse.architectures.runs.predict import predict_images
    from trifuse.architectures.storage.text import count

    paths = predict_images(
        arguments.model,
        arguments.images,
        arguments.out,
        window=None if arguments.window is None else tuple(arguments.window),
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
        device=arguments.device,
        nonfinite=arguments.nonfinite,
        max_ram=arguments.max_ram,
        prior_labels=arguments.prior_labels,
        spacing_mm=None if arguments.spacing is None else tuple(arguments.spacing),
        frame=arguments.frame,
    )
    print(f"{count(len(paths), 'label map')} in {arguments.out}")
