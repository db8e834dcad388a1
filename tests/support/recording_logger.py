"""A logger that keeps what it is told."""

from __future__ import annotations

from typing import Any


class RecordingLogger:
    """Keeps its calls in the order in which they came; the call of that number fails, counted from 1."""

    def __init__(self, name: str = "recording", fails_at: int = 0) -> None:
        self.name, self._fails_at = name, fails_at
        self.calls: list[Any] = []

    def start(self, folder, configuration, epochs_done):
        self._keep(("start", folder, configuration, epochs_done))

    def log(self, row):
        self._keep(("log", row["epoch"]))

    def close(self, *, finished):
        self._keep(("close", finished))

    def _keep(self, call: Any) -> None:
        self.calls.append(call)
        if len(self.calls) == self._fails_at:
            raise ConnectionError("nobody listens")
