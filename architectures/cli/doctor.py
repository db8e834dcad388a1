"""``trifuse doctor``: what is installed and which backend each operator would use, or what a network costs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from trifuse.architectures.runs.registry import NETWORKS

from .arguments import add_command


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "doctor", run, "say what is installed, and which backend each operator would use")
    help = "say instead what that network costs: parameters and GFLOPs"
    parser.add_argument("--model", choices=NETWORKS, help=help)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Print the findings."""
    if arguments.model is None:
        from .installation import examine, format_findings

        findings = examine()
        text = format_findings(findings)
    else:
        from .cost import count_costs, format_costs

        findings = count_costs(arguments.model)
        text = format_costs(findings)
    print(json.dumps(findings, indent=2) if arguments.json else text)
