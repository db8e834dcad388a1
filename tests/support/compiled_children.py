"""Children in which Triton compiles: tests themselves run with TRITON_INTERPRET where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


def run_without_interpreter(
    *command: object, folder: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python on a script, in a folder, with these environment variables on top."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), *filter(None, [environment.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
