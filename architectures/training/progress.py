"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time

from tqdm import tqdm

_LINE_EVERY_S = 60.0


class Progress:
    """Say how far a run is.

    Args:
        enabled: False says nothing, as on all ranks but the first.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: tqdm | None = None
        self._last_line_s = time.monotonic()
        self._title = ""
        self._steps = 0

    def say(self, text: str) -> None:
        """Print a line; a full disk is no error, and a reader that has gone away (``| head``) neither."""
        if not self._enabled:
            return
        try:
            with tqdm.external_write_mode(sys.stdout):
                print(text, flush=True)
        except BrokenPipeError:
            self._enabled = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        except OSError:
            pass  # the line is lost; the run is not

    def start(self, title: str, steps: int, done: int = 0) -> None:
        """Begin something of ``steps`` steps, of which ``done`` are done."""
        self._title, self._steps = title, steps
        if self._enabled and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(desc=title, total=steps, initial=done, leave=False, dynamic_ncols=True)

    def advance(self, done: int, note: str = "") -> None:
        """Report a step."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line_s > _LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self.say(f"{self._title}: {done} of {self._steps} {note}".rstrip())

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
