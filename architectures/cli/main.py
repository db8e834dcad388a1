"""The ``trifuse`` command: parses the words, then hands over; nothing heavy is imported before they are understood.

Exit codes: 0 ok, 2 usage, 3 bad data, 4 bad checkpoint, 5 numeric failure, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .arguments import build_parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that ``words`` spell and return its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return _run(arguments, words)
    except KeyboardInterrupt:  # outside of training, which has a code and a checkpoint for it
        print("trifuse: stopped by Ctrl-C", file=sys.stderr)
        return 130  # as shells have it
    except BrokenPipeError:  # the reader of our output has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until the process ends, a few instructions away
        return 0


def _run(arguments: argparse.Namespace, words: list[str]) -> int:
    from trifuse.architectures.training.checkpoint import SaveError
    from trifuse.architectures.training.signals import Interrupted
    from trifuse.kernels import CheckpointError, DataError, NumericError, TrifuseError

    from . import commands, train

    codes: list[tuple[type[Exception], int]] = [
        (commands.UsageError, 2),
        (Interrupted, 75),
        (DataError, 3),
        (SaveError, 5),
        (CheckpointError, 4),
        (NumericError, 5),
        (TrifuseError, 2),
        (OSError, 3),  # a disk that is full, a folder that may not be written
    ]
    try:
        place = train if hasattr(train, arguments.run) else commands
        return getattr(place, arguments.run)(arguments, ["trifuse", *words]) or 0
    except BrokenPipeError:
        raise
    except tuple(kind for kind, _ in codes) as error:
        if arguments.traceback:
            raise
        print(f"trifuse: {_said(error)}", file=sys.stderr)
        return next(code for kind, code in codes if isinstance(error, kind))


def _said(error: Exception) -> str:
    """Return the message of an error; that of the system without its number, the file first."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
