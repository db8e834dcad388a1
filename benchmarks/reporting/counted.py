"""Run a module as ``python -m`` does, and write down how many of our Triton kernels it launched.

    python -m trifuse.benchmarks.reporting.counted FILE.json MODULE [ARGUMENT ...]

The file holds the launches by kernel, and the operators whose kernels could not be built with the reason. It is written
however the module ends; not if the process is killed.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from trifuse.kernels import library


def main(argv: Sequence[str]) -> None:
    """Run the module; it ends this process in its own way."""
    file, module, *arguments = argv
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        counted = {"kernels": library.launched, "fallbacks": library.fallbacks()}
        Path(file).write_text(json.dumps(counted), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
