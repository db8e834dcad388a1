"""``trifuse data``: look at a cohort or at ECGs, or write a cohort in another layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.architectures.data.layouts.cohort_options import cohort_arguments
from trifuse.architectures.runs.options import positive
from trifuse.architectures.storage.text import count

from .arguments import NONFINITE, add_cohort_options, add_command, add_commands, require_folder_of


def add_parser(commands: Any) -> None:
    """Add the command and its own commands."""
    help = "look at a cohort or at ECGs, or write a cohort in another layout"
    data_commands = add_commands(commands, "data", help, "commands", "COMMAND")

    help = "read every file of a cohort and list all that is wrong with it"
    check = add_command(data_commands, "check", run, help)
    check.set_defaults(do=_check)
    add_cohort_options(check)
    check.add_argument("--strict", action="store_true", help="count warnings as errors")
    check.add_argument("--digests", type=Path, help="JSON file of SHA-256 digests: compared if there, else written")

    ecg = add_command(data_commands, "check-ecg", run, "read every ECG of a folder down to its median beat")
    ecg.set_defaults(do=_check_ecgs)
    ecg.add_argument(
        "data", type=Path, metavar="records", help="PTB-XL's folder, a folder of WFDB records or arrays, or one file"
    )
    ecg.add_argument("--min-beats", type=positive, default=3, help="that make a median beat (%(default)s)")

    convert = add_command(data_commands, "convert", run, "write a cohort in another layout")
    convert.set_defaults(do=_convert)
    add_cohort_options(convert)
    written = [layout for layout in LAYOUTS if layout.export is not None]
    help = "; ".join(f"{layout.name}: {layout.summary}" for layout in written)
    convert.add_argument("--to", choices=[layout.name for layout in written], required=True, help=help)
    convert.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    convert.add_argument("--split", type=Path, help='JSON file with "train", "val" and "test"')
    help = "cases to test on (the cohort's own)"
    convert.add_argument("--test-cases", nargs="+", metavar="PATTERN", default=[], help=help)
    help = "how to treat NaN and infinite voxels (%(default)s)"
    convert.add_argument("--nonfinite", choices=NONFINITE, default="error", help=help)
    for layout in written:
        for option in layout.export.options if layout.export else ():
            option.add_to(convert)


def run(arguments: argparse.Namespace, argv: list[str]) -> int | None:
    """Run one of the commands."""
    return arguments.do(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from trifuse.architectures.data.layouts.check import check_folder

    if arguments.digests is not None:
        require_folder_of(arguments.digests)
    findings = check_folder(arguments.data, **cohort_arguments(arguments), digests=arguments.digests)
    cohort = findings.cohort
    cases = count(len(cohort.cases), "case")
    print(f"{arguments.data}: {cohort.layout} layout, {cases}, classes {', '.join(cohort.class_names)}")
    for warning in findings.warnings:
        print(f"warning: {warning}")
    for error in findings.errors:
        print(f"error: {error}")
    print(f"{count(len(findings.errors), 'error')}, {count(len(findings.warnings), 'warning')}")
    return 3 if findings.errors or (arguments.strict and findings.warnings) else 0


def _check_ecgs(arguments: argparse.Namespace) -> int:
    from trifuse.architectures.data.ecg.check import check_ecgs

    findings = check_ecgs(arguments.data, min_beats=arguments.min_beats)
    for note in findings.notes:
        print(f"note: {note}")
    for record in findings.records:
        print(record)
    print(f"{count(len(findings.records), 'record')}, {count(len(findings.errors), 'error')}")
    return 3 if findings.errors else 0


def _convert(arguments: argparse.Namespace) -> None:
    from trifuse.architectures.data.layouts.export import write_cohort
    from trifuse.architectures.data.layouts.open_cohort import open_cohort
    from trifuse.architectures.runs.recipes import DataRecipe

    cohort = open_cohort(arguments.data, **cohort_arguments(arguments))
    split = cohort.split
    if arguments.split or arguments.test_cases:
        chosen = DataRecipe(split=arguments.split and str(arguments.split), test_cases=tuple(arguments.test_cases))
        split = chosen.choose_split(cohort)
    layout, export = next((one, one.export) for one in LAYOUTS if one.export is not None and one.name == arguments.to)
    options = {option.name: getattr(arguments, option.name) for option in export.options}
    write_cohort(layout, cohort, arguments.out, split, nonfinite=arguments.nonfinite, **options)
    if note := export.note(cohort):
        print(f"note: {note}")
    if len({case.patient for case in cohort.cases}) < len(cohort.cases):
        print("note: this layout does not tell patients: when it is read, --patient finds them in the cases' names")
    print(f"{count(len(cohort.cases), 'case')}, of which {len(split.test) if split else 0} test, in {arguments.out}")
