"""The virtual GPU's machine, built once for all that need it."""

from __future__ import annotations

import fcntl
import importlib.util
import os
from pathlib import Path

import pytest

from trifuse.kernels.testing.emulator import machine


@pytest.fixture(autouse=True, scope="session")
def _one_machine(tmp_path_factory):
    """Build it while other workers wait, each of which would build its own."""
    if importlib.util.find_spec("triton") is None:
        return
    folder = tmp_path_factory.getbasetemp()
    with Path(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder, "machine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        machine.library()
