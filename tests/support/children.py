"""Children that tests may kill: forked, so that they need not import torch again."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable

import torch

from trifuse.architectures.training.signals import Interrupted


class Child:
    """A forked process that runs one function; its exit code is 0, 75 if interrupted, 1 if anything else was raised."""

    def __init__(self, work: Callable[[], object], **environment: str) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                os.environ.update(environment)
                torch.set_num_threads(1)
                work()
                code = 0
            except Interrupted:
                code = 75
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self, limit_s: float = 60.0) -> int:
        """Return the exit code, or minus the signal that ended it."""
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"the child did not end within {limit_s} s")


def run_ranks(work: Callable[[], object], ranks: int = 2, limit_s: float = 60.0) -> list[int]:
    """Run a function on several ranks, as torchrun would, and return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        Child(
            work,
            WORLD_SIZE=str(ranks),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(ranks)
    ]
    return [child.wait(limit_s) for child in children]
