"""Signals that end a run at the next step, from where it can be resumed."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from trifuse.kernels.errors import TrifuseError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TORCHRUN_ECHO_S = 2.0  # torchrun passes on a signal that the terminal or SLURM already sent to every process


class Interrupted(TrifuseError):
    """A signal ended the run; it can be resumed. The command line turns this into exit code 75."""


class StopSignals:
    """Within this context SIGTERM, SIGINT and SIGUSR1 ask for a stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._first_at_s = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.requested is None:
            self.requested, self._first_at_s = signal.Signals(number), now_s
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now_s - self._first_at_s > _TORCHRUN_ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
