"""Run the tests of kernels and of compiled code with each pair of torch and Triton that trifuse supports.

``pairs.csv`` beside this file lists the pairs, with what NumPy has to be. Each gets a virtual environment of its own,
which a later run uses again, and the tests of ``TESTED`` run there on this tree; what came of it is written to
``kernels/testing/verdicts/versions.csv``, unless there are uncommitted changes.

Two more rows are about the other packages: all at the floors of ``pyproject.toml``, with the oldest pair, and all at
their newest, with the newest. The tests that use them run there, ``USING_OTHERS``.

    python tests/versions/run.py [--environments build/versions] [2.10.0 2.10.0-floors ...]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trifuse.kernels.tested_versions import VERSIONS, Verdict, read_verdicts

ROOT = Path(__file__).resolve().parents[2]
PAIRS = Path(__file__).with_name("pairs.csv")
FLOORS, NEWEST = "floors", "newest"
TESTED = ("tests/kernels", "tests/benchmarks/static_cases")  # the virtual GPU's are among the first
USING_OTHERS = (
    *("tests/architectures/data", "tests/architectures/storage", "tests/architectures/evaluation"),
    *("tests/architectures/dino_unet/test_convert.py", "tests/benchmarks", "tests/kernels/testing"),
    "tests/docs/test_integrations.py",
)
COLUMNS = (
    *("torch", "triton", "others", "python", "numpy", "passed", "failed", "skipped", "why_skipped"),
    *("seconds", "commit", "date", "packages"),
)
LONGEST_REASON = 60  # characters of why a test was skipped
SELECTED = "not slow"  # as in `make test`
SECONDS_PER_TEST = 1800  # several environments share a machine with whatever else runs there


def read_pairs() -> list[Verdict]:
    """Return the supported pairs, and those with which the other packages are tested."""
    return read_verdicts(PAIRS)


def name_of(pair: Mapping[str, str]) -> str:
    """Return what the command line calls a pair."""
    return f"{pair['torch']}-{pair['others']}" if pair["others"] else pair["torch"]


def floors() -> dict[str, str]:
    """Return the oldest version of each other package that may be installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    found = dict(match.groups() for one in wanted if (match := re.match(r"([\w-]+)>=([\d.]+)", one)))
    return {name: version for name, version in found.items() if name not in ("torch", "triton")}


def environment_of(pair: Mapping[str, str], folder: Path) -> Path:
    """Return the Python of a pair's virtual environment, which is made where there is none.

    The newest packages are looked for each time, in the environment of the pair itself.
    """
    newest = pair["others"] == NEWEST
    place = folder / f"torch-{pair['torch'] if newest else name_of(pair)}"
    python, constraints, ready = place / "bin" / "python", place / "constraints.txt", place / "ready"
    wanted = f"torch=={pair['torch']}\ntriton=={pair['triton']}\nnumpy{pair['numpy']}\n"
    if pair["others"] == FLOORS:
        wanted += "".join(f"{name}=={version}\n" for name, version in floors().items())
    state = wanted + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if not newest and ready.exists() and ready.read_text(encoding="utf-8") == state:
        return python
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    constraints.write_text(wanted, encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    install += ["--upgrade", "--upgrade-strategy", "eager"] if newest else []
    subprocess.run([*install, "torch", "triton", "numpy"], check=True)
    subprocess.run([*install, "--editable", ".[test]"], cwd=ROOT, check=True)
    ready.write_text(state, encoding="utf-8")
    return python


def run_tests(python: Path, tests: Sequence[str], jobs: int, cache: Path) -> tuple[dict[str, str], list[str]]:
    """Run tests of this tree; return the counts as a verdict holds them, and the names of those that failed."""
    with tempfile.TemporaryDirectory(prefix="trifuse-versions-") as scratch:
        Path(scratch, "trifuse").symlink_to(ROOT)
        report = Path(scratch, "report.xml")
        environment = os.environ | {"PYTHONPATH": scratch, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            SELECTED,
            f"-n{jobs}",
            f"--timeout={SECONDS_PER_TEST}",
            f"--junitxml={report}",
            f"--basetemp={scratch}/pytest",
        ]
        start = time.monotonic()
        # -P: this folder's "kernels" is not the package of that name, for which other packages look
        subprocess.run([str(python), "-P", "-m", "pytest", *options, *tests], cwd=ROOT, env=environment)
        return counts_of(report) | {"seconds": str(round(time.monotonic() - start))}, failures_of(report)


def counts_of(report: Path) -> dict[str, str]:
    """Count a report's tests by what came of them, and say why tests were skipped."""
    suite = next(xml.parse(report).iter("testsuite"))
    tests, failed, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "skipped"))
    failed += int(suite.get("errors", 0))
    reasons = Counter(node.get("message", "")[:LONGEST_REASON] for node in suite.iter("skipped"))
    return {
        "passed": str(tests - failed - skipped),
        "failed": str(failed),
        "skipped": str(skipped),
        "why_skipped": "; ".join(f"{count} {reason}" for reason, count in reasons.most_common()),
    }


def failures_of(report: Path) -> list[str]:
    """Return the names of the tests that failed."""
    cases = xml.parse(report).iter("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return [f"{case.get('classname')}::{case.get('name')}" for case in failed]


def installed(python: Path) -> dict[str, str]:
    """Return what an environment holds: its Python, and the packages that have a floor."""
    code = (
        "import importlib.metadata as m, json, platform; "
        f"print(json.dumps({{'python': platform.python_version()}} | {{n: m.version(n) for n in {[*floors()]}}}))"
    )
    return json.loads(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout)


def packages(held: Mapping[str, str]) -> str:
    """Return what an environment holds in one line, as a verdict has it."""
    return " ".join(f"{name}=={version}" for name, version in held.items() if name != "python")


def clean_commit() -> str:
    """Return the commit of the tree; empty where there are uncommitted changes, or no git."""
    git = ("git", "-C", str(ROOT))
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    changes = [line for line in changed.stdout.splitlines() if not line.endswith(VERSIONS.name)]
    if changed.returncode or changes:
        return ""
    return subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def write_verdict(verdict: Verdict, file: Path = VERSIONS) -> None:
    """Put a pair's verdict in the place of its last one; those of pairs that are no longer supported go."""
    found = {name_of(row): row for row in read_verdicts(file)} | {name_of(verdict): verdict}
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found[name] for name in map(name_of, read_pairs()) if name in found)


def run_pairs(pairs: Iterable[Verdict], environments: Path, jobs: int) -> int:
    """Run the tests with each pair, and return how many failed."""
    commit, total = clean_commit(), 0
    if not commit:
        print("there are uncommitted changes: no verdict is written", flush=True)
    for pair in pairs:
        python = environment_of(pair, environments)
        tests = USING_OTHERS if pair["others"] else TESTED
        counts, failures = run_tests(python, tests, jobs, python.parents[1] / "triton-cache")
        print(f"torch {name_of(pair)}, triton {pair['triton']}: {counts}", *failures, sep="\n  ", flush=True)
        total += int(counts["failed"])
        if commit:
            today = datetime.date.today().isoformat()
            names = {name: pair[name] for name in ("torch", "triton", "others")}
            held = installed(python)
            names |= {"python": held["python"], "numpy": held["numpy"], "packages": packages(held)}
            write_verdict(names | counts | {"commit": commit, "date": today})
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description="run the tests with each supported pair of torch and Triton")
    parser.add_argument("torch", nargs="*", help="which to run, such as 2.10.0 or 2.10.0-floors; all if none is named")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "versions", help="folder for them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests at a time")
    options = parser.parse_args()
    pairs = [pair for pair in read_pairs() if not options.torch or name_of(pair) in options.torch]
    if not pairs:
        parser.error(f"no such pairs: {' '.join(options.torch)}")
    return 1 if run_pairs(pairs, options.environments.absolute(), options.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
