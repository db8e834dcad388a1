"""Break one promise at a time, and see that the test which keeps it turns red.

Every ``*.patch`` beside this file changes the library so that it breaks one promise; its head says which, and names the
test that must notice::

    # promise: the gradient of the logits is centred
    # test: tests/kernels/ops/test_weighted_block_fusion.py::test_backward

The patch is applied to a copy of the tree, and that test alone is run there, slow or not, after all named tests were
seen to pass without any patch. A test that stays green lets its mutant survive: `make mutants` then fails.

    python tests/mutants/run.py [name ...]
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from ready_python import run_python  # noqa: E402

FOLDERS = ("kernels", "blocks", "architectures", "benchmarks", "hub", "website", "tests", "docs")
PAGES = ("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE")
COPIED = (*FOLDERS, *PAGES, "pyproject.toml", "Makefile", "constraints.txt")
VERDICTS = Path(__file__).with_name("verdicts.csv")
COLUMNS = ("mutant", "verdict", "test", "commit")
READY = ("torch", "pytest", "hypothesis", "scipy.ndimage", "nibabel", "safetensors.torch", "tqdm")
TIMEOUT_SECONDS, TIMEOUT_OF_ALL_SECONDS = 900, 5400
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


def run_tests(
    tests: Iterable[str], patch: Path | None = None, *, stop_early: bool = True, limit_s: int = TIMEOUT_SECONDS
) -> tuple[int, str]:
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
        environment = {"PYTHONPATH": str(links), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONSAFEPATH": "1"}  # or transformers would take the folder kernels for a package
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={scratch}/pytest", *(["-x"] if stop_early else [])]
        command = ["-m", "pytest", *options, *tests]
        result = run_python(*command, folder=tree, ready=READY, limit_s=limit_s, **environment)
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


def tests_that_fail(tests: Iterable[str], jobs: int) -> set[str]:
    """Run tests on the tree as it is, and return those that fail, without the brackets of their parameters."""
    code, output = run_tests(["-n", str(jobs), *sorted(set(tests))], stop_early=False, limit_s=TIMEOUT_OF_ALL_SECONDS)
    if code == GREEN:
        return set()
    print(output, "A test must pass before it can be seen to fail.", sep="\n", flush=True)
    return set(re.findall(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", output, flags=re.MULTILINE)) or set(tests)


def verdict_of(code: int) -> str:
    """Return what pytest's exit code says of a mutant: that no test was run, say, is neither red nor survival."""
    return {RED: "red", GREEN: "survived"}.get(code, "broken")


def clean_commit(written: Path = VERDICTS) -> str:
    """Return the commit of the tree; empty where there are uncommitted changes but in ``written``, or no git."""
    git = ("git", "-C", str(ROOT))
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    changes = [line for line in changed.stdout.splitlines() if not line.endswith(written.name)]
    if changed.returncode or changes:
        return ""
    return subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def read_verdicts(path: Path = VERDICTS) -> dict[str, dict[str, str]]:
    """Read the verdicts by mutant; none where no file is there."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        return {row["mutant"]: row for row in csv.DictReader(stream)}


def write_verdicts(verdicts: Mapping[str, Mapping[str, str]], path: Path = VERDICTS) -> None:
    """Write the verdicts of those mutants that there still are."""
    names = {mutant.patch.stem for mutant in all_mutants()}
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(verdicts[name] for name in sorted(names & verdicts.keys()))


def main() -> int:
    parser = argparse.ArgumentParser(description="show that each test named by a mutant turns red")
    parser.add_argument("names", nargs="*", help="mutants to run, by file name without .patch; all if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--missing", action="store_true", help="only those without a verdict of red yet")
    options = parser.parse_args()
    verdicts, commit = read_verdicts(), clean_commit()
    mutants = [mutant for mutant in all_mutants() if not options.names or mutant.patch.stem in options.names]
    if options.missing:
        mutants = [mutant for mutant in mutants if verdicts.get(mutant.patch.stem, {}).get("verdict") != "red"]
    if not mutants:
        parser.error(f"no such mutants: {' '.join(options.names)}")
    if not commit:
        print("there are uncommitted changes: no verdict is written", flush=True)

    failing = tests_that_fail((mutant.test for mutant in mutants), options.jobs)
    alive = [mutant for mutant in mutants if mutant.test.partition("[")[0] in failing]
    fit = [mutant for mutant in mutants if mutant not in alive]
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = pool.map(lambda mutant: run_tests([mutant.test], mutant.patch), fit)
        for mutant, (code, output) in zip(fit, outcomes, strict=True):
            name, word = mutant.patch.stem, verdict_of(code)
            print(f"{word:8}  {name:44}  {mutant.promise}", flush=True)
            if code != RED:
                alive.append(mutant)
                print(f"          {mutant.test}\n{output}")
            if commit:
                verdicts[name] = {"mutant": name, "verdict": word, "test": mutant.test, "commit": commit}
                write_verdicts(verdicts)
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants turned their test red")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
