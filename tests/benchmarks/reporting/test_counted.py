"""What a counted module has launched is written down while it runs, and last when it has ended."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict

from trifuse.benchmarks.reporting import counted
from trifuse.kernels import library


def test_a_slow_writer_does_not_outlast_the_end(tmp_path, monkeypatch):
    """What follows the module is still writing when the module ends: the end is told after it."""
    write, writing, followers = counted.write, threading.Event(), []

    def slow_write(file, counts):
        if threading.current_thread() is not threading.main_thread():
            followers.append(threading.current_thread())
            writing.set()
            time.sleep(0.3)
        write(file, counts)

    def run_module(*arguments, **options):
        library.launched["_some_kernel"] += 1
        assert writing.wait(60)

    monkeypatch.setattr(library, "launched", defaultdict(int))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(counted, "EVERY_S", 0.01)
    monkeypatch.setattr(counted, "write", slow_write)
    monkeypatch.setattr(counted.runpy, "run_module", run_module)
    file = tmp_path / "launches.json"
    counted.main([str(file), "module"])
    for follower in followers:
        follower.join()
    assert json.loads(file.read_text()) == {"kernels": {"_some_kernel": 1}, "fallbacks": {}, "ended": True}
