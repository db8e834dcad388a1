"""The report as a command, with time enough for an interpreter; its parts are forked, ready, instead of started.

    python tests/rehearsal/quick_report.py --out FOLDER     # in `stand_in_gpu.environment`

How parts are started is tested beside the report's other tests. A part finds here what it would find there, see
`ready_python`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from ready_python import run_python

from trifuse.benchmarks.reporting import report

GPU_SECONDS = 1e5
READY = ("pytest", "hypothesis", "torch._dynamo", "torch.testing")  # and what the stand-in GPU imports


def run_part(part: report.Part, limit_s: float, log: Path, scratch: Path, variables: dict[str, str]) -> report.Outcome:
    """Run one part into its log; of the interpreter, each must be told that it runs."""
    start_s = time.monotonic()
    variables = variables | {"TRITON_INTERPRET": "1"}
    child = run_python(*part.command[1:], folder=scratch, ready=READY, limit_s=int(limit_s), **variables)
    log.write_text(child.stdout + child.stderr, encoding="utf-8")
    return report.Outcome(part, child.returncode, time.monotonic() - start_s, limit_s)


if __name__ == "__main__":
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # no part is run by a worker of pytest
        del os.environ[name]
    report.GPU_SECONDS, report.run_part = GPU_SECONDS, run_part
    sys.exit(report.main(sys.argv[1:]))
