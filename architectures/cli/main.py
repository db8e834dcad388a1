"""The ``trifuse`` command: parses its arguments, then hands over; nothing heavy is imported before they make sense.

Exit codes: 0 ok, 2 usage, 3 bad data, 4 bad checkpoint, 5 numeric failure, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from . import COMMANDS
from .arguments import EXIT_CODES, SuggestingParser, UsageError, commands_below, in_words_of, require_packages


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    description = "Fused kernels, blocks and segmentation networks."
    parser = SuggestingParser(prog="trifuse", description=description, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"trifuse {version('trifuse')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"{__package__}.{name}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` spells, without the program's name, and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):  # names may hold what the terminal has no sign for, or what is no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(_parsed(argv), argv)
    except KeyboardInterrupt:  # outside of training, which has a code and a checkpoint for it
        print("trifuse: stopped by Ctrl-C", file=sys.stderr)
        return 130  # as shells have it
    except BrokenPipeError:  # the reader of our output has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until the process ends, a few instructions away
        return 0


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    arguments.reword = in_words_of(arguments.parser, *commands_below(parser))
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _replace_closed_streams() -> None:
    """Let a command that was started without its standard streams (``>&-``) speak to nobody.

    Otherwise the files that it opens would get their numbers, and what a library prints there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115 - until the process ends


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    from trifuse.architectures.training.checkpoint import SaveError
    from trifuse.architectures.training.memory import named_exhaustion
    from trifuse.architectures.training.signals import Interrupted
    from trifuse.kernels import CheckpointError, DataError, NumericError, TrifuseError

    codes: list[tuple[type[Exception], int]] = [
        (UsageError, 2),
        (Interrupted, 75),
        (DataError, 3),
        (SaveError, 5),
        (CheckpointError, 4),
        (NumericError, 5),
        (TrifuseError, 2),
        (OSError, 3),  # a disk that is full, a folder that may not be written
    ]
    try:
        require_packages(arguments)
        with named_exhaustion():
            return arguments.run(arguments, ["trifuse", *argv]) or 0
    except BrokenPipeError:
        raise
    except tuple(kind for kind, _ in codes) as error:
        if arguments.traceback:
            raise
        print(f"trifuse: {_message(error, arguments.reword)}", file=sys.stderr)
        return next(code for kind, code in codes if isinstance(error, kind))


def _message(error: Exception, reword: Callable[[str], str]) -> str:
    """Return the message of an error in the command's words; that of the system without its number, the file first."""
    from trifuse.kernels import DataError

    if isinstance(error, DataError):
        return error.told(reword)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
