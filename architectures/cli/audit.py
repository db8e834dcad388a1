"""``trifuse audit``: which mechanisms of a trained network do anything, on the run's own cases."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.options import positive

from .arguments import add_command, between
from .train import PARTS


def add_parser(commands: Any) -> None:
    """Add the command."""
    help = "switch off, exchange or hold each mechanism of a run's network, and count what moves"
    parser = add_command(commands, "audit", run, help)
    parser.add_argument("folder", type=Path, metavar="run", help="folder of a run")
    parser.add_argument("--split", choices=PARTS, default="test", help="whose cases are predicted (%(default)s)")
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", default=["*"], help="cases of these to take (all)")
    help = "share of the voxels below which a mechanism is called dead (%(default)s)"
    parser.add_argument("--threshold", type=between(0, 1, 0.01), default=0.01, metavar="SHARE", help=help)
    parser.add_argument("--hd95", action="store_true", help="also measure the change of HD95, which takes longer")
    parser.add_argument("--out", type=Path, help="folder to write into (audit/<split> in the run)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier audit")
    parser.add_argument("--batch-size", type=positive, default=8, help="slices at a time (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (%(default)s)")


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Audit the run, print what was found, and where its page and its chart lie."""
    from trifuse.architectures.evaluation.audit_report import format_audit
    from trifuse.architectures.runs.audit import audit_run

    found = audit_run(
        arguments.folder,
        part=arguments.split,
        patterns=arguments.cases,
        threshold=arguments.threshold,
        hd95=arguments.hd95,
        batch_size=arguments.batch_size,
        device=arguments.device,
        out=arguments.out,
        overwrite=arguments.overwrite,
        command=argv,
    )
    print(format_audit(found.audit))
    print(f"\nreport:  {found.page}")
    print(f"picture: {found.picture.png}")
