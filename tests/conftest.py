"""What every test relies on: the interpreter where there is no GPU, one thread per worker, repeatable drawing, data."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))  # for compiling and tiny_networks, which several folders use

# `python -m pytest` looks for packages in the root as well, where the folder kernels is not the hub's package.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parents[1]]

# Before triton is imported anywhere: it reads the variable when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers share the machine's cores: more threads than one each would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

LONG_S = 900  # the limit of a test that may keep a worker busy for a minute and more

hypothesis.settings.register_profile("trifuse", deadline=None, max_examples=25, database=None)
hypothesis.settings.register_profile("repeatable", hypothesis.settings.get_profile("trifuse"), derandomize=True)
hypothesis.settings.load_profile("repeatable" if "CI" in os.environ else "trifuse")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let two workers begin with half each of what has a longer limit of time than most: last, it would keep one alone.

    With ``--dist worksteal`` the second one begins in the middle.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    limits = {item: marker.args[0] for item in items if (marker := item.get_closest_marker("timeout"))}
    longest = sorted(filter(lambda item: limits.get(item, 0) >= LONG_S, items), key=lambda item: -limits[item])
    others = [item for item in items if limits.get(item, 0) < LONG_S]
    middle = len(others) // 2
    items[:] = [*longest[::2], *others[:middle], *longest[1::2], *others[middle:]]


def pytest_collection_finish() -> None:
    """Let collections of garbage pass over what was imported: it stays, and is most of what there is."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Let a worker that has reported end at once: Python would take apart all that torch made, for seconds."""
    if hasattr(config, "workerinput"):
        atexit._run_exitfuncs()  # which ends children that still run
        os._exit(0)


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from quick_interpreter import quick_interpreter

    with quick_interpreter():
        yield


@pytest.fixture(scope="session")
def trifuse_data() -> Path:
    """Return the folder of real data that TRIFUSE_DATA names; skip where it names none, fail where it is not there."""
    if "TRIFUSE_DATA" not in os.environ:
        pytest.skip("TRIFUSE_DATA is not set: it names the folder with the public data sets")
    folder = Path(os.environ["TRIFUSE_DATA"])
    if not folder.is_dir():
        pytest.fail(f"TRIFUSE_DATA names {folder}, which is not a folder")
    return folder
