"""``trifuse demo``: the whole way on a synthetic cohort, for each network that has one; several side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.experiment import Demo
from trifuse.architectures.runs.registry import experiment, experiments
from trifuse.kernels.errors import MissingExtra

from .arguments import UsageError, add_command, given_values

OUT = Path("demo")
OUTPUT = "output.txt"  # in the folder of a demo that runs beside others: all that it prints


def add_parser(commands: Any) -> None:
    """Add the command."""
    help = "train, predict and report on a synthetic cohort, in minutes on a CPU"
    parser = add_command(commands, "demo", run, help)
    demos = _demos()
    what = "; ".join(f"{name}: {demo.summary}" for name, demo in demos.items())
    parser.add_argument("networks", nargs="*", choices=[*demos], metavar="NETWORK", help=f"{what} (all, side by side)")
    help = f"folder to write to; of several networks, one below it for each ({OUT}, below it one for each)"
    parser.add_argument("--out", type=Path, help=help)
    parser.add_argument("--seed", type=int, default=0, help="of the phantom and of training (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in the folder")
    for name, demo in demos.items():
        if demo.options:
            group = parser.add_argument_group(f"of {name}")
            for option in demo.options:
                option.add_to(group)


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run the demos that are named, or all; return the exit code of the first that failed."""
    folders = _folders(arguments)
    demos = {name: _demos()[name] for name in folders}
    _check(demos, folders, arguments.overwrite)
    if len(demos) > 1:
        return _run_beside(demos, folders, arguments)
    ((name, demo),) = demos.items()
    further = given_values(arguments, demo.options)
    run_demo = experiment(name).load(demo.run)
    report = run_demo(folders[name], seed=arguments.seed, overwrite=arguments.overwrite, **further, command=argv)
    print(f"\nopen first: {report}")
    return 0


def _demos() -> dict[str, Demo]:
    return {each.name: each.demo for each in experiments() if each.demo is not None}


def _folders(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return the folder of each demo that is asked for.

    Raises:
        UsageError: a network is named twice, or an option is given of one that is not.
    """
    names: Sequence[str] = arguments.networks or [*_demos()]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name} is named more than once")
    for name, demo in _demos().items():
        for option in demo.options:
            if name not in names and getattr(arguments, option.name) is not None:
                raise UsageError(f"{option.flag} is for {name}, which is not among the networks; name it, too")
    if len(names) == 1 and arguments.out is not None:
        return {names[0]: arguments.out}
    return {name: (arguments.out or OUT) / name for name in names}


def _check(demos: Mapping[str, Demo], folders: Mapping[str, Path], overwrite: bool) -> None:
    """Refuse what a demo could not be finished with, before any has begun.

    Raises:
        MissingExtra: a package is not installed.
        OutputFolderError: a folder is in use, or not to be replaced.
    """
    needed = {package: extra for demo in demos.values() for package, extra in demo.packages.items()}
    missing = {package: extra for package, extra in needed.items() if find_spec(package) is None}
    if missing:
        raise MissingExtra(next(iter(missing)), ",".join(dict.fromkeys(missing.values())), "trifuse demo")

    from trifuse.architectures.runs.claim import check_run_folder

    for name, demo in demos.items():
        for below in demo.folders:
            check_run_folder(folders[name] / below, overwrite=overwrite)


def _run_beside(demos: Mapping[str, Demo], folders: Mapping[str, Path], arguments: argparse.Namespace) -> int:
    """Run demos side by side, and say what each has reached or why it failed; return the exit code."""
    from trifuse.architectures.evaluation.report import REPORT, headline_of
    from trifuse.architectures.runs.side_by_side import run_side_by_side

    program = [sys.executable, "-P", "-m", __package__, "demo"]
    commands = {name: [*program, name, *_words(demo, folders[name], arguments)] for name, demo in demos.items()}
    outputs = {name: folder / OUTPUT for name, folder in folders.items()}
    print(f"side by side; all that they print: {', '.join(map(str, outputs.values()))}", flush=True)
    ended = run_side_by_side(commands, outputs)
    for name, command in ended.items():
        if command.code != 0:
            told = command.errors.rstrip() or "it said nothing"
            print(f"\ntrifuse demo {name} {command.how_it_ended}:\n{told}", file=sys.stderr, flush=True)
    reports = {name: folders[name] / "run" / REPORT for name, command in ended.items() if command.code == 0}
    for name, report in reports.items():
        print(f"\n{name}: {headline_of(report)}\n  open {report}")
    if reports:
        print(f"\nopen first: {next(iter(reports.values()))}")
    return next((command.exit_code for command in ended.values() if command.code != 0), 0)


def _words(demo: Demo, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the options that a demo has among others, for ``trifuse demo`` with it alone."""
    words = ["--out", str(folder), "--seed", str(arguments.seed)]
    for option in demo.options:
        if (value := getattr(arguments, option.name)) is not None:
            words += [option.flag, str(value)]
    return words + [f"--{flag}" for flag in ("overwrite", "traceback") if getattr(arguments, flag)]
