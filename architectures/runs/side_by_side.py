"""Several commands at a time, each in a process of its own: one line for each while they run, all else in a file.

On a terminal the lines are redrawn in place. Elsewhere, as in the log of a build, the line of a command is printed with
the time since the start when it has changed, now and then: whole lines, of one command each.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from typing import IO, TextIO

from trifuse.architectures.training.signals import Interrupted, StopSignals

_LOOK_EVERY_S = 0.2
_LINE_EVERY_S = 20.0  # of each command, where lines are not redrawn
_END_WITHIN_S = 5.0  # of a signal; then it is killed
_EPOCH = re.compile(r"epoch \d+[^,]*?(?=,| loss|\n)")
_SCORE = re.compile(r"\bval_dice [\d.]+")


class Command:
    """A command in a process of its own, begun at once, whose output is read and kept in a file.

    Args:
        words: the program and its arguments.
        output: file for all that it prints; its folder is made.

    Attributes:
        output: that file.
        errors: what it printed to its standard error.
        code: its exit code, minus the signal that ended it, or None while it runs.
    """

    def __init__(self, words: Sequence[str], output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output, self.errors, self.seconds = output, "", 0.0
        self.code: int | None = None
        self._stage, self._epoch, self._started_s = "starting", "", time.monotonic()
        self._file, self._lock = open(output, "w", encoding="utf-8"), Lock()  # noqa: SIM115 - until `end`
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,  # what it starts itself ends with it, and Ctrl-C is ours to pass on
        )
        streams = ((self._process.stdout, self._take_up), (self._process.stderr, self._take_error))
        self._readers = [Thread(target=self._read, args=stream, daemon=True) for stream in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], take: Callable[[str], None]) -> None:
        for line in stream:
            with self._lock:
                self._file.write(line)
                self._file.flush()
                take(line)

    def _take_error(self, line: str) -> None:
        self.errors += line

    def _take_up(self, line: str) -> None:
        """Note how far the command is, from what it printed."""
        if epoch := _EPOCH.match(line):
            self._epoch = ", ".join([epoch[0], *_SCORE.findall(line)[:1]])
        elif line.strip() and not line.startswith("before training"):
            self._stage, self._epoch = line.strip(), ""

    @property
    def line(self) -> str:
        """How far it is, in one line."""
        if self.code is not None:
            return f"{'done' if self.code == 0 else 'failed'} after {_clock(self.seconds)}"
        return f"{self._stage}; {self._epoch}" if self._epoch else self._stage

    @property
    def exit_code(self) -> int:
        """Its exit code; of one that a signal ended, that of a run which was interrupted."""
        return 75 if self.code is None or self.code < 0 else self.code

    @property
    def how_it_ended(self) -> str:
        """In words, after its name: with which exit code, or by which signal."""
        if self.code is not None and self.code < 0:
            return f"was ended by {signal.Signals(-self.code).name} (if memory ran out, run one at a time)"
        return f"failed with exit code {self.code}"

    def look(self) -> bool:
        """Tell whether it runs; of one that has ended, take all that it printed."""
        if self.code is None and (code := self._process.poll()) is not None:
            for reader in self._readers:
                reader.join(_END_WITHIN_S)  # longer, if a process that it left behind holds its output
            self.seconds, self.code = time.monotonic() - self._started_s, code
        return self.code is None

    def ask_to_end(self) -> None:
        """Ask it, if it runs, and all processes that it has started to end."""
        if self.code is None:
            self._send(signal.SIGTERM)

    def end(self) -> None:
        """Wait a little for its end, then kill what is left of it; close its file."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_WITHIN_S)
        if self.code != 0:
            self._send(signal.SIGKILL)
        for reader in self._readers:
            reader.join(_END_WITHIN_S)
        self._file.close()

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def run_side_by_side(commands: Mapping[str, Sequence[str]], outputs: Mapping[str, Path]) -> dict[str, Command]:
    """Run commands at the same time, say how far each is, and return them when all have ended, by name.

    Each computes on one thread, as ``OMP_NUM_THREADS`` tells it. One that fails leaves the others alone.

    Args:
        commands: program and arguments, by the name that stands before the line of each.
        outputs: by name, the file for all that it prints.

    Raises:
        Interrupted: SIGTERM or SIGUSR1 came; the commands were ended.
        KeyboardInterrupt: likewise, by Ctrl-C.
    """
    running: dict[str, Command] = {}
    with StopSignals() as stop:
        try:
            for name, words in commands.items():
                running[name] = Command(words, outputs[name])
            lines = _Lines(sys.stdout, running)
            while [name for name, command in running.items() if command.look()]:  # all of them
                if stop.requested == signal.SIGINT:
                    raise KeyboardInterrupt
                if stop.requested is not None:
                    raise Interrupted(f"stopped by {stop.requested.name}, with {', '.join(running)}")
                lines.show()
                time.sleep(_LOOK_EVERY_S)
            lines.show()
        except BaseException:
            for command in running.values():
                command.ask_to_end()
            raise
        finally:
            for command in running.values():
                command.end()
    return running


class _Lines:
    """The lines of commands on a stream."""

    def __init__(self, stream: TextIO, commands: Mapping[str, Command]) -> None:
        self._stream, self._commands, self._started_s = stream, commands, time.monotonic()
        self._redrawn = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._width = max(map(len, commands))
        self._said = dict.fromkeys(commands, ("", -_LINE_EVERY_S))  # the last line of each, and when
        self._drawn = False

    def show(self) -> None:
        """Show the line of each command, where it has changed."""
        if self._redrawn:
            self._redraw()
            return
        now_s = time.monotonic() - self._started_s
        for name, command in self._commands.items():
            said, when_s = self._said[name]
            if command.line != said and (now_s - when_s >= _LINE_EVERY_S or command.code is not None):
                self._said[name] = line, _ = command.line, now_s
                print(f"{_clock(now_s):>5}  {name:<{self._width}}  {line}", file=self._stream, flush=True)

    def _redraw(self) -> None:
        columns = shutil.get_terminal_size().columns - 1  # a line that is full begins another
        clock = _clock(time.monotonic() - self._started_s)
        lines = [f"{clock:>5}  {name:<{self._width}}  {one.line}" for name, one in self._commands.items()]
        up = f"\x1b[{len(lines)}A" if self._drawn else ""
        self._stream.write(up + "".join(f"\r\x1b[2K{line[:columns]}\n" for line in lines))
        self._stream.flush()
        self._drawn = True


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
