"""Several computations at a time, each on one thread, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch


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
    """
    if jobs == 1:
        for each in arguments:
            _on_one_thread(work, *each)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_on_one_thread, work, *each) for each in arguments]:
            done.result()


def _on_one_thread(work: Callable[..., object], *arguments: Any) -> None:
    with one_thread():
        work(*arguments)
