"""Runs in processes of their own, for `torture`: alone, with a trap in the process, or as two ranks.

A trap hears of what a process does to files through Python's own audit events, so that no other code knows of it. It
goes off before the n-th of them in one folder: the process kills itself there, or from there on no file grows beyond
some size. Beyond it the kernel ends the process in the middle of a write (``cut``), or refuses to write, as a full disk
does (``full``).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any, Literal, Protocol

from trifuse.architectures.storage.text import read_text

RANKS = 2
LONGEST_S = 900.0  # a run takes seconds; a machine may be busy
COUNTED = "accesses to the run's folder: "
COMMAND = "trifuse.architectures.cli"
_NEEDED = (  # what a run imports, so that it takes less time than its imports; what is not installed is left out
    *("torch", "numpy", "scipy.ndimage", "matplotlib.pyplot", "nibabel"),
    *(f"trifuse.architectures.runs.{name}" for name in ("pipeline", "repeats", "report")),
)
_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Trap:
    """What happens in a process, and before which of its accesses to the files of a folder.

    Attributes:
        folder: absolute.
        access: which one, counted from 1; 0 for none.
        does: what happens.
        largest_bytes: for ``cut`` and ``full``, the size beyond which no file grows.
        lasts: for ``full``, how many accesses later there is room again; 0 for never.
    """

    folder: str
    access: int = 0
    does: Literal["kill", "cut", "full"] = "kill"
    largest_bytes: int = 0
    lasts: int = 0


def _be(module: str, words: Sequence[str], output: Connection, trap: Trap) -> None:
    """Be ``python -m MODULE WORDS`` on one thread, in a session of its own; all that it prints goes to ``output``.

    The last line says how many accesses the trap counted.
    """
    import torch

    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as where this were a process like any other
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - those before knew another file
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    seen = _set(trap)
    sys.argv[1:] = words
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"{COUNTED}{seen[0]}", flush=True)


def _set(trap: Trap) -> list[int]:
    """Set a trap, and return a list of one number: that of the accesses so far."""
    import resource

    seen = [0]
    if trap.does == "cut":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not str(arguments[0]).startswith(trap.folder):
            return
        seen[0] += 1
        if seen[0] == trap.access:
            if trap.does == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            _limit(trap.largest_bytes)
        elif trap.lasts and seen[0] == trap.access + trap.lasts:
            _limit(None)

    sys.addaudithook(hear)
    return seen


def _limit(size_bytes: int | None) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size_bytes is None else size_bytes, hard))


def accesses_in(text: str) -> int:
    """Return how many accesses a trap has counted, from what its process printed; 0 where it did not get that far."""
    counted = [line.removeprefix(COUNTED) for line in text.splitlines() if line.startswith(COUNTED)]
    return int(counted[-1]) if counted else 0


class Session(Protocol):
    """A run between its start and its end.

    Attributes:
        pid: of its process; of ranks, that of torchrun.
    """

    pid: int

    def wait(self, longest_s: float = LONGEST_S) -> int | None:
        """Return the exit code, or minus the signal; None if it did not end in that time, and was killed."""

    def kill(self) -> None:
        """End it at once, if it still runs."""

    def text(self) -> str:
        """Return all that it has printed."""


Start = Callable[[Sequence[str], Trap], Session]


class Alone:
    """``python -m MODULE WORDS``, forked from a server that has imported PyTorch, with a trap in it."""

    def __init__(self, words: Sequence[str], trap: Trap, module: str = COMMAND) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_NEEDED))
        receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_be, args=(module, words, sender, trap))
        self._process.start()
        sender.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._output = _Output(receiver.fileno(), receiver.close)

    def wait(self, longest_s: float = LONGEST_S) -> int | None:
        """Wait for its end: see `Session`."""
        self._process.join(longest_s)
        code = self._process.exitcode
        if code is None:
            self.kill()
        self._output.wait()
        return code

    def kill(self) -> None:
        """End it at once: see `Session`."""
        if self._process.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.join()

    def text(self) -> str:
        """Return all that it has printed."""
        return self._output.text()


class Ranks:
    """Two ranks under torchrun."""

    def __init__(self, words: Sequence[str], trap: Trap | None = None) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command = [sys.executable, *launch, "-m", COMMAND, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self._output = _Output(self._process.stdout.fileno(), self._process.stdout.close)

    def ranks(self) -> list[int]:
        """Return the processes of the ranks that run."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(word) for word in read_text(children).split()] if children.exists() else []

    def wait(self, longest_s: float = LONGEST_S) -> int | None:
        """Wait for its end: see `Session`."""
        try:
            code: int | None = self._process.wait(longest_s)
        except subprocess.TimeoutExpired:
            code = None
            self.kill()
        self._output.wait()
        return code

    def kill(self) -> None:
        """End them at once: see `Session`."""
        if self._process.poll() is None:
            for process in (*self.ranks(), self.pid):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._process.wait()

    def text(self) -> str:
        """Return all that they have printed."""
        return self._output.text()


class _Output:
    """What comes out of a pipe, read while it comes."""

    def __init__(self, handle: int, close: Callable[[], None]) -> None:
        self._parts: list[bytes] = []
        self._thread = Thread(target=self._read, args=(handle, close), daemon=True)
        self._thread.start()

    def _read(self, handle: int, close: Callable[[], None]) -> None:
        while part := os.read(handle, 1 << 16):
            self._parts.append(part)
        close()

    def wait(self) -> None:
        self._thread.join(10)  # longer only if a process is left behind

    def text(self) -> str:
        return b"".join(self._parts).decode(errors="replace")


def handles(pid: int, number: signal.Signals) -> bool:
    """Tell whether a process has a handler of its own for a signal."""
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        mask = int(next(line for line in status if line.startswith("SigCgt:")).split()[1], 16)
        return bool(mask >> (number - 1) & 1)
    return False


def left_after(processes: Sequence[int], wait_s: float = 5.0) -> list[int]:
    """Return which of some processes still run, after waiting a little for their ends."""
    end_s = time.monotonic() + wait_s
    while (left := [pid for pid in processes if _runs(pid)]) and time.monotonic() < end_s:
        time.sleep(0.1)
    return left


def _runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
