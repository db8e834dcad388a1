"""``trifuse data``: look at a cohort or at ECGs, write a cohort in another layout, or a synthetic one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.architectures.data.layouts.cohort_options import cohort_arguments
from trifuse.architectures.runs.options import positive
from trifuse.architectures.storage.text import count, listed

from .arguments import NONFINITE, UsageError, add_cohort_options, add_command, add_commands, require_folder_of


def add_parser(commands: Any) -> None:
    """Add the command and its own commands."""
    help = "look at a cohort or at ECGs, write a cohort in another layout, or a synthetic one"
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
    _add_phantom(data_commands)


def _add_phantom(data_commands: Any) -> None:
    help = "write a synthetic cohort of scars that the image cannot tell from their like, while an ECG can"
    phantom = add_command(data_commands, "phantom", run, help)
    phantom.set_defaults(do=_write_phantom)
    phantom.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    for name, default, what in (("train", 220, "train"), ("val", 20, "validate"), ("test", 60, "test")):
        phantom.add_argument(f"--{name}", type=int, default=default, help=f"cases that {what} (%(default)s)")
    axes = ("COLUMNS", "ROWS", "SLICES")
    help = "of a case (64 64 6)"
    phantom.add_argument("--size", type=positive, nargs=3, metavar=axes, default=(64, 64, 6), help=help)
    phantom.add_argument("--missing", type=float, default=0.1, help="share of cases without an ECG (%(default)s)")
    help = "share of cases whose ECG speaks of another territory than the scar's (%(default)s)"
    phantom.add_argument("--wrong", type=float, default=0.05, help=help)
    help = "median beats of others, in the folder beats, to train the autoencoder on (%(default)s)"
    phantom.add_argument("--beats", type=int, default=1000, help=help)
    phantom.add_argument("--seed", type=int, default=0, help="decides everything (%(default)s)")


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
    warnings = findings.told_warnings()
    for warning in warnings:
        print(f"warning: {warning}")
    for error in findings.errors:
        print(f"error: {error.told(arguments.reword)}")
    print(f"{count(len(findings.errors), 'error')}, {count(len(warnings), 'warning')}")
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
    unused = split.unused if split else ()
    if unused:
        print(f"note: left out, as the split does not use them: {listed(unused)}")
    written = count(len(cohort.cases) - len(unused), "case")
    print(f"{written}, of which {len(split.test) if split else 0} test, in {arguments.out}")


def _write_phantom(arguments: argparse.Namespace) -> None:
    from trifuse.architectures.runs.registry import experiments

    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise UsageError(f"{arguments.out} is not an empty folder; choose another name")
    names = ("train", "val", "test", "missing", "wrong", "beats", "seed")
    known = next(known for known in experiments() if known.phantom)
    wishes = {name: getattr(arguments, name) for name in names}
    try:
        split = known.load(known.phantom)(arguments.out, size=arguments.size, **wishes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    cases = count(len(split.train) + len(split.val) + len(split.test), "case")
    print(f"{cases}, of which {len(split.test)} test, and {count(arguments.beats, 'beat')} in {arguments.out}")
