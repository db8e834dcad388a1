"""What the parsers of several commands share: groups of options, suggestions for typing errors, checks of paths."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from trifuse.architectures.data.layouts.cohort_options import COHORT_OPTIONS
from trifuse.architectures.data.layouts.layout import Option
from trifuse.architectures.runs.options import OptionGroup, RecipeOption
from trifuse.kernels.choices import nearest
from trifuse.kernels.errors import require

EXIT_CODES = "exit codes: 0 ok, 2 usage, 3 bad data, 4 bad checkpoint, 5 numeric failure, 75 interrupted and resumable"
NONFINITE = ("error", "zero", "median")
Run = Callable[[argparse.Namespace, list[str]], int | None]
Needs = tuple[str, ...] | Callable[[argparse.Namespace], Iterable[str]]

EXTRAS = {  # by the package that is imported, the extra of trifuse that installs it
    "scipy": "med",
    "matplotlib": "med",
    "wfdb": "ecg",
    "h5py": "h5",
    "transformers": "hf",
    "tensorboard": "tb",
    "mlflow": "mlflow",
    "kernels": "hub",
    "hypothesis": "bench",
    "pytest_benchmark": "bench",
}
REPORTING = ("scipy", "matplotlib")  # what scores, and the pictures of a report, need

COHORT = RecipeOption(
    "data.root", "data", "folder of the cohort, in any of the layouts", {"type": Path, "metavar": "cohort"}
)


class UsageError(Exception):
    """The arguments of a command make no sense together."""


class _SaidOnce(argparse.Action):
    """Store the value of an option, which would otherwise be the last one of an option that is given twice."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        said = namespace.__dict__.setdefault("said", set())
        if option_string is not None and self.dest in said:
            raise argparse.ArgumentError(self, f"given more than once; the last time as {values!r}")
        said.add(self.dest)
        setattr(namespace, self.dest, values)


class SuggestingParser(argparse.ArgumentParser):
    """An argument parser that suggests what an unknown word may have meant, and takes each option once."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        for name in (None, "store"):
            self.register("action", name, _SaidOnce)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}{self._suggestion(message)}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if value != []:  # a list of words that is left out, which some versions of Python look up among the choices
            super()._check_value(action, value)

    def _suggestion(self, message: str) -> str:
        if "unrecognized arguments: " in message:
            known = [option for action in self._actions for option in action.option_strings]
            words = [word.split("=")[0] for word in message.split() if word.startswith("-")]
        elif found := re.search(r"argument ([^:]+): invalid choice: '([^']*)'", message):
            name, word = found.groups()
            words = [word]
            known = [str(choice) for action in self._actions if _is(action, name) for choice in action.choices or ()]
        else:
            return ""
        near = next(filter(None, (nearest(word, known) for word in words)), None)
        return f"; did you mean {near}?" if near else ""


def in_words_of(*parsers: argparse.ArgumentParser) -> Callable[[str], str]:
    """Return a function that puts names of arguments into the words of a command: ``nonfinite="zero"`` is an option.

    Args:
        parsers: of the command; and those of others, whose options are named where it has none of its own, but for
            a word that is all of a text, which may mean something else.
    """
    flags: dict[str, str] = {}
    for parser in parsers:
        for action in parser._actions:
            long = [word for word in action.option_strings if word.startswith("--")]
            if long:
                flags.setdefault(action.dest, long[0])
    names = "|".join(sorted(flags, key=len, reverse=True))
    given = re.compile(rf"\b({names})=(?:([\"'])(.*?)\2|([^\s,;]+))")
    mentioned = re.compile(rf"(?<![\w./-])({'|'.join(name for name in flags if '_' in name)})\b(?!=|/|\.\w)")
    own = {action.dest for action in parsers[0]._actions}

    def value_after(match: re.Match[str]) -> str:
        value = match[3] or match[4]
        return flags[match[1]] if value == "True" else f"{flags[match[1]]} {shlex.quote(value)}"

    def reword(text: str) -> str:
        text = flags[text] if text in flags and text in own else given.sub(value_after, text)
        return mentioned.sub(lambda match: flags[match[1]], text)

    return reword


def commands_below(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of all commands that a parser has, and of those that they have."""
    below = [each for action in parser._actions if isinstance(action.choices, dict) for each in action.choices.values()]
    return [*below, *(further for each in below for further in commands_below(each))]


def _is(action: argparse.Action, name: str) -> bool:
    """Tell whether an error message of argparse means this argument by that name."""
    return name == "/".join(action.option_strings) or name in (action.metavar, action.dest)


def add_command(commands: Any, name: str, run: Run, help: str, needs: Needs = ()) -> argparse.ArgumentParser:
    """Add a command that can be run, and return its parser.

    Args:
        commands: what ``add_subparsers`` returned.
        name: of the command.
        run: is called with the parsed arguments and the command line, ``["trifuse", ...]``; returns the exit
            code, or None for 0.
        help: one line.
        needs: the optional packages that it needs whatever the data are, or a function of the arguments that returns
            them; those that files alone call for are looked for when the files are found.
    """
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=EXIT_CODES)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(run=run, parser=parser, needs=needs)
    return parser


def require_packages(arguments: argparse.Namespace) -> None:
    """Refuse a command for which a package is missing, before it does anything.

    Raises:
        MissingExtra: with the command that installs it.
    """
    needs = arguments.needs(arguments) if callable(arguments.needs) else arguments.needs
    for package in needs:
        require(package, EXTRAS[package], arguments.parser.prog)


def add_commands(commands: Any, name: str, help: str, title: str, metavar: str) -> Any:
    """Add a command that has commands of its own, and return what `add_command` adds those to."""
    return commands.add_parser(name, help=help).add_subparsers(title=title, required=True, metavar=metavar)


def add_cohort_options(parser: argparse.ArgumentParser, help: str = COHORT.help) -> None:
    """Add the folder of a cohort, with another ``help`` where it may be more, and the options on how it is read."""
    add_group(parser, OptionGroup("cohort", (replace(COHORT, help=help), *COHORT_OPTIONS)))


def add_group(parser: argparse.ArgumentParser, group: OptionGroup) -> None:
    """Add options under their title."""
    added = parser.add_argument_group(group.title)
    for option in group.options:
        option.add_to(added)


def given_values(arguments: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """Return, by dotted name, the fields of a recipe that the options set which were given.

    Where one of them names a folder of weights, what that decides comes first: other options win.
    """
    values: dict[str, Any] = {}
    of_weights: dict[str, Any] = {}
    for option in options:
        value = getattr(arguments, option.name)
        if value is None:
            continue
        values[option.field] = value
        values |= getattr(option, "sets", {})
        if describe := getattr(option, "weights", ""):
            section = option.field.rpartition(".")[0]
            described = arguments.experiment.load(describe)(Path(value))
            of_weights |= {f"{section}.{name}": each for name, each in described.items()}
    return of_weights | values


def between(low: float, high: float, usual: float) -> Callable[[str], float]:
    """Return what reads a number between two others, such as the usual one, for argparse."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low
        if not low < value < high:
            raise argparse.ArgumentTypeError(
                f"expected a number between {low:g} and {high:g}, such as {usual:g}, got {text!r}"
            )
        return value

    return number


def refuse_existing(path: Path, what: str = "", replaceable: Callable[[Path], bool] | None = None) -> None:
    """Refuse a path that is taken, but for what may be replaced there, and a table whose folder is not there.

    Args:
        path: to be written.
        what: in words, what may be replaced, such as "a table of scores".
        replaceable: with ``--overwrite``, tells whether what lies there is that; None replaces nothing.

    Raises:
        UsageError: saying what to do.
    """
    if path.exists():
        if replaceable is None:
            raise UsageError(f"{path} exists already; choose another name")
        if not replaceable(path):
            raise UsageError(f"{path} exists already, and --overwrite replaces {what} alone; choose another name")
    if path.suffix == ".csv":
        require_folder_of(path)


def refuse_replacing(out: Path, name: str, inputs: Iterable[Path] = ()) -> None:
    """Refuse to draw ``<name>.png``, and its table, over files that are read, or that are no earlier picture.

    Raises:
        UsageError: naming the file.
    """
    from trifuse.architectures.evaluation.picture import is_picture
    from trifuse.architectures.storage.file_names import real_path

    png, table = out / f"{name}.png", out / f"{name}.csv"
    read, drawn = set(map(real_path, inputs)), png.exists() and is_picture(png)
    for path, what in ((table, "the table of an earlier picture"), (png, "an earlier picture")):
        if path.exists() and (real_path(path) in read or not drawn):
            raise UsageError(f"{path} is not {what}, and would be replaced; choose another --out")


def require_folder_of(path: Path) -> None:
    """Refuse a file whose folder is not there.

    Raises:
        UsageError: naming the folder.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
