"""``trifuse compare``: runs against each other, case by case or by days, or beside each other in one picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import UsageError, add_command, refuse_existing, refuse_replacing


def add_parser(commands: Any) -> None:
    """Add the command."""
    help = "test runs against each other, case by case, or show them together"
    parser = add_command(commands, "compare", run, help, _needs)
    help = "folder of a run, or its case table (CSV); two of them, or more with --overlay"
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help=help)
    parser.add_argument("--out", type=Path, help="CSV file for the comparison, or folder for the picture")
    shown = parser.add_mutually_exclusive_group()
    help = "draw image, truth and the predictions of two or more runs side by side"
    shown.add_argument("--overlay", action="store_true", help=help)
    help = "draw and tabulate the DSC of two runs by the days between ECG and MRI (interval)"
    shown.add_argument("--by", choices=("interval",), help=help)


def _needs(arguments: argparse.Namespace) -> tuple[str, ...]:
    return ("matplotlib",) if arguments.overlay or arguments.by else ("scipy",)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Compare two runs, or draw several."""
    from trifuse.architectures.evaluation.statistics import compare_runs, format_comparison, write_comparison_table
    from trifuse.architectures.storage.file_names import real_path

    if len(arguments.runs) < 2 or (len(arguments.runs) > 2 and not arguments.overlay):
        raise UsageError(f"expected two runs to compare (--overlay shows more), got {len(arguments.runs)}")
    if arguments.overlay or arguments.by:
        _draw(arguments)
        return
    if arguments.out is not None:
        refuse_existing(arguments.out)
    a, b = arguments.runs
    if real_path(a) == real_path(b):
        raise UsageError(f"expected two runs to compare, got {a} twice")
    tables = _case_table(a), _case_table(b)
    _check_same_cases(arguments.runs)
    rows = compare_runs(*tables)
    print(format_comparison(rows, str(a), str(b)))
    if arguments.out is not None:
        write_comparison_table(arguments.out, rows)


def _draw(arguments: argparse.Namespace) -> None:
    from trifuse.architectures.runs.interval_comparison import compare_by_interval
    from trifuse.architectures.runs.overlay import compare_overlay

    option = "--overlay" if arguments.overlay else "--by interval"
    if arguments.out is None:
        raise UsageError(f"{option} draws a picture: say with --out which folder it goes to")
    if files := [str(run) for run in arguments.runs if run.is_file()]:
        raise UsageError(f"{option} looks at the cases of a run: expected folders of runs, got {', '.join(files)}")
    refuse_replacing(arguments.out, "interval_bars" if arguments.by else "model_overlays")
    _check_same_cases(arguments.runs)
    if arguments.by:
        picture, table = compare_by_interval(arguments.runs, arguments.out)
        print(f"{table}\n\npicture: {picture.png}")
        return
    print(f"picture: {compare_overlay(arguments.runs, arguments.out).png}")


def _check_same_cases(runs: Sequence[Path]) -> None:
    """Refuse runs whose cases or targets are others than those of the first one, as far as they are folders of runs."""
    from trifuse.architectures.runs.folder import RUN_FILE
    from trifuse.architectures.runs.results import check_same_cases

    folders = [run for run in runs if (run / RUN_FILE).is_file()]
    for run in folders[1:]:
        check_same_cases(run, folders[0])


def _case_table(path: Path) -> Path:
    """Find the case table of a run's headline, or take the table itself."""
    from trifuse.architectures.evaluation.tables import case_tables
    from trifuse.architectures.runs.results import check_tables

    if not path.is_dir():
        return path
    check_tables(path)
    return case_tables(path)[0]
