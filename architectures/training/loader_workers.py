"""The processes that load samples: what each of them works on, and what is said when one of them is lost.

PyTorch notices a worker's death wherever the training process happens to be: while it waits for samples, in the middle
of a step, or while it validates. It then knows a process number, and nothing of the sample.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from trifuse.architectures.storage.atomic_files import is_running
from trifuse.kernels.errors import DataError, TrifuseError

from .memory import OutOfMemory, exhaustion, is_exhausted, memory_note, named_exhaustion
from .signals import Interrupted

Key = tuple[int, int, int]
"""Seed, epoch and index: all that a sample depends on."""

_DEATH_SHOWS_S = 2.0  # a pipe of a dying process breaks before the process counts as dead
_ENDS_S = 5.0  # how long a process may take to end when it is told to


class WorkerLost(Interrupted):
    """A process that loads samples died; the run can be resumed."""


class KeyedSamples(Dataset[Any]):
    """A data set whose errors say which sample they are about.

    In a worker an error is handed over as the sample, and raised by whoever asked for it: PyTorch would put the
    worker's traceback into its message.

    Args:
        dataset: the samples by their keys; may have ``name_of(key)``, which says which case a sample shows.
        workers: processes that load them.
    """

    def __init__(self, dataset: Any, workers: int) -> None:
        self._dataset = dataset
        self._at = torch.full((workers, 3), -1).share_memory_() if workers else None  # process, epoch, index

    def __getitem__(self, key: Key) -> Any:
        worker = get_worker_info()
        if worker is not None and self._at is not None:
            self._at[worker.id] = torch.tensor((os.getpid(), *key[1:]))
        try:
            return self._dataset[key]
        except TrifuseError as error:
            failed = error
        except Exception as error:
            name, processes = self.name_of(key), worker.num_workers if worker else 1
            failed = DataError(name, type(error).__name__, got=error)
            if is_exhausted(error):
                failed = exhaustion(error, name, processes)
            failed.__cause__ = error
        if worker is None:
            raise failed
        return failed

    def name_of(self, key: Key) -> str:
        """Return the number of a sample, and what it shows where the data set can tell."""
        known: Callable[[Key], str] | None = getattr(self._dataset, "name_of", None)
        return f"sample {key[2]} of epoch {key[1]}" + (f" ({known(key)})" if known else "")

    def last_sample_of(self, process: int, seed: int) -> str | None:
        """Name the sample that a process began last; None if it began none."""
        for pid, epoch, index in [] if self._at is None else self._at.tolist():
            if pid == process:
                return self.name_of((seed, epoch, index))
        return None


def collated(samples: list[Any]) -> Any:
    """Make a batch of samples, or return the first error among them."""
    failed = [sample for sample in samples if isinstance(sample, TrifuseError)]
    if failed:
        return failed[0]
    worker = get_worker_info()
    try:
        with named_exhaustion(f"a batch of {len(samples)} samples", worker.num_workers if worker else 1):
            return default_collate(samples)
    except OutOfMemory as error:
        return error


class WorkerWatch:
    """The worker processes of one loader."""

    def __init__(self, samples: KeyedSamples, seed: int) -> None:
        self._samples, self._seed = samples, seed
        self._processes: list[Any] = []

    def started(self, start: Callable[[], Any]) -> Any:
        """Return what ``start`` returns, and watch the processes that it starts."""
        before = set(multiprocessing.active_children())
        result = start()
        self._processes += set(multiprocessing.active_children()) - before
        return result

    @contextmanager
    def named_losses(self) -> Iterator[None]:
        """Turn what PyTorch raises on the death of a worker, wherever that is, into a `WorkerLost`."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            try:
                lost = self._lost(wait_s=0.0 if isinstance(error, RuntimeError) else _DEATH_SHOWS_S)
            except RuntimeError as notice:  # the pipe broke first, and PyTorch notices only now
                error, lost = notice, self._lost(wait_s=0.0)
            if not lost:
                raise
            described = "; ".join(self._description(process, error) for process in lost)
            raise WorkerLost(f"{described}; {memory_note()}") from error

    def close(self) -> None:
        """End the processes, without waiting until nothing refers to their loader any more."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(_ENDS_S)
            if process.exitcode is None:
                with suppress(RuntimeError):  # PyTorch says that it was killed
                    process.kill()
                    process.join()

    def _lost(self, wait_s: float) -> list[Any]:
        """Return the processes that have died, after waiting for the first of them."""
        end_s = time.monotonic() + (wait_s if self._processes else 0.0)
        while not (lost := [process for process in self._processes if _is_dead(process)]):
            if time.monotonic() >= end_s:
                break
            time.sleep(0.05)
        return lost

    def _description(self, process: Any, error: Exception) -> str:
        sample = self._samples.last_sample_of(process.pid, self._seed)
        how = _how_it_died(process.exitcode, str(error))
        return f"loader process {process.pid} {how}, {f'at {sample}' if sample else 'before its first sample'}"


def say_nothing_of_a_lost_reader(worker: int) -> None:
    """Let a worker be silent about a training process that has stopped reading: that one says why."""
    say = sys.excepthook

    def chosen(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError):
            say(kind, error, trace)

    sys.excepthook = chosen


def _is_dead(process: Any) -> bool:
    """Tell whether a process has died; its exit code is lost where PyTorch raises in the middle of asking for it."""
    return process.exitcode is not None or not is_running(process.pid)


def _how_it_died(code: int | None, said: str) -> str:
    """Say how a process died, by its exit code, or by what PyTorch says where that is lost."""
    if code is None:
        told = [number for number in signal.Signals if f"signal: {signal.strsignal(number)}." in said]
        return f"was killed by {told[0].name}" if told else "died"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
