"""Run a module as ``python -m`` does, and write down how many of our Triton kernels it launched.

    python -m trifuse.benchmarks.reporting.counted FILE.json MODULE [ARGUMENT ...]

The file holds the launches by kernel, the operators whose kernels could not be built with the reason, and whether the
module has ended. It is brought up to date while the module runs, so that of a process which is killed it tells what was
launched until then, the last second apart.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trifuse.kernels import library

EVERY_S = 0.5


def main(argv: Sequence[str]) -> None:
    """Run the module; it ends this process in its own way."""
    name, module, *arguments = argv
    file, ended = Path(name), threading.Event()
    counted = _counts(ended=False)
    write(file, counted)
    following = threading.Thread(target=_follow, args=(file, counted, ended), daemon=True)
    following.start()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        ended.set()
        following.join()
        write(file, _counts(ended=True))


def write(file: Path, counted: Mapping[str, Any]) -> None:
    """Write what was counted, whole or not at all."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(counted), encoding="utf-8")
    os.replace(unfinished, file)


def _counts(*, ended: bool) -> dict[str, Any]:
    return {"kernels": dict(library.launched), "fallbacks": library.fallbacks(), "ended": ended}


def _follow(file: Path, counted: Mapping[str, Any], ended: threading.Event) -> None:
    while not ended.wait(EVERY_S):
        try:
            now = _counts(ended=False)
        except RuntimeError:  # an operator fell back while they were listed
            continue
        if now != counted:
            counted = now
            write(file, counted)


if __name__ == "__main__":
    main(sys.argv[1:])
