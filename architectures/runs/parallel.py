"""Several computations at a time, each on one thread, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

from trifuse.architectures.training.signals import Interrupted


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: layers this small gain nothing from a second, and the result is the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_each(work: Callable[..., object], arguments: Sequence[tuple[Any, ...]], jobs: int = 1) -> None:
    """Call ``work`` once with each tuple of arguments, on one thread.

    Args:
        work: a function of a module, so that another process finds it.
        arguments: of each call; they are copied to that process.
        jobs: calls at a time; one needs no other process.

    Raises:
        Interrupted: a process was killed; what was computed is kept.
    """
    if jobs == 1:
        for each in arguments:
            _on_one_thread(work, *each)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            for done in [pool.submit(_on_one_thread, work, *each) for each in arguments]:
                done.result()
        except BrokenProcessPool as error:
            want = "if memory ran out, use fewer jobs; resume to continue"
            raise Interrupted(f"one of {jobs} processes was killed before its work was done: {want}") from error


def _on_one_thread(work: Callable[..., object], *arguments: Any) -> None:
    with one_thread():
        work(*arguments)
