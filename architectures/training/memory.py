"""Memory that runs out: how it is recognised, and what is said of it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trifuse.architectures.storage.survival import is_exhausted
from trifuse.architectures.storage.text import read_text

from .signals import Interrupted

_ADVICE = "use fewer workers, smaller batches, or more micro-batches per step (training.accumulate)"


class OutOfMemory(Interrupted):
    """Memory ran out; the run can be resumed."""


@contextmanager
def named_exhaustion(what: str = "", processes: int = 1) -> Iterator[None]:
    """Turn what is raised when memory runs out into an `OutOfMemory` with an estimate of what is needed, and advice.

    Args:
        what: was done, such as the sample that was loaded.
        processes: that do the same, each in memory of its own.
    """
    try:
        yield
    except Exception as error:
        if not is_exhausted(error):
            raise
        raise exhaustion(error, what, processes) from error


def exhaustion(error: Exception, what: str, processes: int = 1) -> OutOfMemory:
    """Return what `named_exhaustion` raises for an error that says that memory ran out."""
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    each = f"each of {processes} such processes" if processes > 1 else "this process"
    whole = f", together {processes * taken:.1f} GiB" if processes > 1 else ""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    told = f"{what}: memory ran out ({reason})" if what else f"memory ran out ({reason})"
    return OutOfMemory(f"{told}; {each} takes up to {taken:.1f} GiB{whole}; {memory_note()}")


def memory_note() -> str:
    """Say how much memory is free, and what to do if that is too little."""
    advice = f"if memory ran out, {_ADVICE}"
    try:
        lines = read_text(Path("/proc/meminfo")).splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return f"{kib['MemAvailable'] / 2**20:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB memory are free: {advice}"
    except (OSError, ValueError, KeyError, IndexError):  # only Linux tells
        return advice
