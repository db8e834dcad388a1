"""Run all benchmarks and the GPU tests where there is no GPU, at tiny sizes on the stand-in: see that they run through.

    make rehearsal                                          # into build/rehearsal, a few minutes
    python tests/rehearsal/run_report.py --out FOLDER       # the same

First the report with ``--tests``, as on a GPU: into the folder. Then ``pytest benchmarks --benchmark-only``: into
``pytest/`` there. What they wrote is looked at: every comparison has its file, every part its count of launches, every
form of ours its kernels. The figures mean nothing; the exit code is 0 if nothing was found to be amiss.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import stand_in_gpu
from ready_python import run_python

from trifuse.benchmarks.reporting import report
from trifuse.benchmarks.reporting.doubts import OURS, doubts

ROOT = Path(__file__).resolve().parents[2]
SECONDS = "0.001"  # for each form: it runs as often as it must
WITHOUT_LAUNCHES = {"memory_efficient_attention", "host_cost"}  # PyTorch's kernels; launches replaced by nothing
REPORT = Path(__file__).with_name("quick_report.py")


def run_report(out: Path, *words: str) -> int:
    """Run the report, or what of it words of its command line ask for, with tiny cases; return its exit code."""
    return _run([sys.executable, str(REPORT), f"--out={out}", f"--seconds={SECONDS}", "--tiny", *words], out)


def run_benchmarks(out: Path, *names: str) -> int:
    """Run the tiny case of each comparison, or of those of some parts, as tests of pytest; return its exit code."""
    which = [f"benchmarks/bench_{name}.py" for name in names] or ["benchmarks"]
    words = [*which, "-q", "-p", "no:cacheprovider", "--benchmark-only", "--tiny"]
    return _run([sys.executable, "-m", "pytest", *words, f"--results={out}", f"--seconds={SECONDS}"], out)


def _run(command: Sequence[str], out: Path) -> int:
    with tempfile.TemporaryDirectory() as cache:
        environment = stand_in_gpu.environment(OMP_NUM_THREADS="1", PYTHONSAFEPATH="1", TRIFUSE_CACHE=cache)
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def amiss_in_results(out: Path, *names: str) -> Iterator[str]:
    """Yield what is wrong with the result files of a folder, which are those of all parts of the report or of some."""
    found = {path.name.removesuffix(".cuda.json"): path for path in out.glob("*.cuda.json")}
    yield from (f"{name} has no result file" for name in sorted(comparisons(*names) - found.keys()))
    for path in found.values():
        yield from doubts(path)
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["stamp"]["device"] != stand_in_gpu.NAME:
            yield f"{path.name} was measured on {record['stamp']['device']}"
        if "rows" not in record:
            continue
        yield from (f"{path.name}: refused: {row['reason']}" for row in record["refused"])
        ours = [row for row in record["rows"] if OURS in row["provider"]]
        if not ours:
            yield f"{path.name} has no figure of ours"
        if record["kernels"]:
            backends = {row["backend"] for row in ours}
            if backends - {"triton"}:
                yield f"{path.name}: forms of ours ran on {sorted(backends)}"


def amiss_in_report(out: Path, *names: str) -> Iterator[str]:
    """Yield what is wrong with the table in a report, which is of all parts and the GPU tests or of some of them."""
    lines = (out / "report.md").read_text(encoding="utf-8").splitlines()
    table = lines[next(at for at, line in enumerate(lines) if line.startswith("| part ")) :]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in takewhile(bool, table)][2:]
    counts = {row[0]: row[-1] for row in rows}
    parts = set(names) or {report.TESTS, *report.part_names()}
    yield from (f"the report tells nothing of {name}" for name in sorted(parts - counts.keys()))
    for name, count in counts.items():
        if not count.isdecimal():
            yield f"{name}: launches {count}"
        elif (int(count) > 0) == (name in WITHOUT_LAUNCHES):
            yield f"{name}: {count} launches"


def comparisons(*names: str) -> set[str]:
    """Return the names that result files shall have: those of all parts of the report, or of some."""
    ask = (
        "import importlib, sys; from trifuse.benchmarks.harness import Comparison\n"
        "for name in sys.argv[1:]:\n"
        "    values = vars(importlib.import_module(f'trifuse.benchmarks.bench_{name}')).values()\n"
        "    print(*(value.name for value in values if isinstance(value, Comparison)), sep='\\n')"
    )
    files = [name for name in names or report.part_names() if name not in (report.TESTS, *report.TOOLS)]
    said = run_python("-c", ask, *files)
    assert said.returncode == 0, said.stderr
    return set(said.stdout.split())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="run the benchmarks on the stand-in GPU, to see that they run through")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "rehearsal", help="folder for the report")
    out = parser.parse_args(argv).out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out} is not empty, and old results would pass for new ones; remove it, or name another folder")
    amiss = [f"the report ended with exit code {code}"] if (code := run_report(out, "--tests")) else []
    amiss += [*amiss_in_report(out), *amiss_in_results(out)]
    if code := run_benchmarks(out / "pytest"):
        amiss.append(f"pytest benchmarks ended with exit code {code}")
    amiss += amiss_in_results(out / "pytest")
    print(*(f"amiss: {what}" for what in amiss), sep="\n")
    return 1 if amiss else 0


if __name__ == "__main__":
    sys.exit(main())
