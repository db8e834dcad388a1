"""Files whose readers may die of them, or take all memory: they are read in a process of its own first."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "size calculation")
_EXHAUSTED = 9  # exit code of the process
MEMORY = "all memory that it may take"


def is_exhausted(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, which NumPy, PyTorch and the system say in different ways."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def fatality(read: Callable[[], object], most_bytes: int | None = None) -> str:
    """Call a reader in a process of its own, and return what that process ended of: a signal's name, or `MEMORY`.

    Args:
        read: is called without arguments; what it returns or raises is not told, for it comes again where the file is
            read in earnest.
        most_bytes: that it may take beyond what this process has; None for no limit.

    Returns:
        An empty text where it returned, or raised.
    """
    child = os.fork()
    if child == 0:
        code = 0
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if most_bytes is not None:
                limit = _address_space() + most_bytes
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
            read()
        except BaseException as error:
            code = _EXHAUSTED if most_bytes is not None and is_exhausted(error) else 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == _EXHAUSTED:
        return MEMORY
    return signal.Signals(-code).name if code < 0 else ""


def _address_space() -> int:
    """Return the bytes that this process has, as limits count them."""
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
