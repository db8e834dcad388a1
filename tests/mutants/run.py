"""Break one promise at a time, and see that the test which keeps it turns red.

Every ``*.patch`` beside this file changes the library so that it breaks one promise; its head says which, and names the
test that must notice::

    # promise: the gradient of the logits is centred
    # test: tests/kernels/ops/test_weighted_block_fusion.py::test_backward

The patch is applied to a copy of the tree, and that test alone is run there, after all named tests were seen to pass
without any patch. A test that stays green lets its mutant survive: `make mutants` then fails.

    python tests/mutants/run.py [name ...]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "blocks", "architectures", "benchmarks", "tests", "docs")
COPIED = (*FOLDERS, "pyproject.toml", "README.md", "LICENSE", "Makefile")
TIMEOUT_SECONDS = 900
GREEN, RED = 0, 1  # pytest's exit codes for "all passed" and "some failed"


@dataclass(frozen=True)
class Mutant:
    """A patch, the promise that it breaks, and the test that must turn red."""

    patch: Path
    promise: str
    test: str


def read_mutant(patch: Path) -> Mutant:
    """Read the head of a patch."""
    head = dict(re.findall(r"^# (promise|test): (.+)$", patch.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return Mutant(patch, head["promise"], head["test"])


def all_mutants() -> list[Mutant]:
    """Return the mutants of this folder."""
    return [read_mutant(patch) for patch in sorted(Path(__file__).parent.rglob("*.patch"))]


def apply(patch: Path, tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Apply a patch to a tree, or only check that it applies with ``--check``."""
    # Without this, git looks for a repository above the tree and skips files that it does not know.
    environment = {**os.environ, "GIT_DIR": os.devnull}
    command = ["git", "apply", *options, str(patch)]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def run_tests(tests: Iterable[str], patch: Path | None = None, *, stop_early: bool = True) -> tuple[int, str]:
    """Run tests on a copy of the tree, patched or not; returns pytest's exit code and its output."""
    with tempfile.TemporaryDirectory(prefix="trifuse-mutant-") as scratch:
        tree, links = Path(scratch, "tree"), Path(scratch, "links")
        _copy_tree(tree)
        links.mkdir()
        (links / "trifuse").symlink_to(tree)
        if patch is not None:
            applied = apply(patch, tree)
            if applied.returncode:
                return -1, f"the patch does not apply: {applied.stderr}"
        environment = {**os.environ, "PYTHONPATH": str(links), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={scratch}/pytest", *(["-x"] if stop_early else [])]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        try:
            result = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return -1, f"no end after {TIMEOUT_SECONDS} s"
        return result.returncode, result.stdout + result.stderr


def _copy_tree(tree: Path) -> None:
    tree.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        else:
            shutil.copy(source, tree / name)
    (tree / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")


def main() -> int:
    parser = argparse.ArgumentParser(description="show that each test named by a mutant turns red")
    parser.add_argument("names", nargs="*", help="mutants to run, by file name without .patch; all if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    options = parser.parse_args()
    mutants = [mutant for mutant in all_mutants() if not options.names or mutant.patch.stem in options.names]
    if not mutants:
        parser.error(f"no such mutants: {' '.join(options.names)}")

    code, output = run_tests(sorted({mutant.test for mutant in mutants}), stop_early=False)
    red_before = set(re.findall(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", output, flags=re.MULTILINE))
    if code != GREEN:
        print(output, "A test must pass before it can be seen to fail.", sep="\n", flush=True)
    alive = [mutant for mutant in mutants if mutant.test in red_before]
    with ThreadPoolExecutor(options.jobs) as pool:
        fit = [mutant for mutant in mutants if mutant not in alive]
        outcomes = pool.map(lambda mutant: run_tests([mutant.test], mutant.patch), fit)
        for mutant, (verdict, output) in zip(fit, outcomes, strict=True):
            word = {RED: "red", GREEN: "SURVIVED"}.get(verdict, "BROKEN")
            print(f"{word:8}  {mutant.patch.stem:44}  {mutant.promise}", flush=True)
            if verdict != RED:
                alive.append(mutant)
                print(f"          {mutant.test}\n{output}")
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants turned their test red")
    return 1 if alive or code != GREEN else 0


if __name__ == "__main__":
    sys.exit(main())
