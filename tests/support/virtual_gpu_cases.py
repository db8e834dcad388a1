"""Run the calls of the GPU tests as compiled, on the virtual GPU, and write down what came of each.

    python tests/support/virtual_gpu_cases.py [OPERATOR[:DTYPE[:CASE]] ...] [--out verdicts.csv]

Each call's values and gradients are held against the reference, with unwritten memory poisoned; each launch is run in
two orders of its programs, with equal bits demanded. A row is added as soon as its case is done, in place of the row
of an earlier run; the exit code tells whether all were sound.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_arguments import ARGUMENTS, DTYPES, assert_call_matches

from trifuse import kernels
from trifuse.kernels import library
from trifuse.kernels.testing import KernelFaults, NoKernelRan, virtual_gpu

COLUMNS = ("operator", "dtype", "case", "verdict", "launches", "findings", "commit", "torch", "triton")
SOUND = "sound"


def operators_with_kernels() -> list[str]:
    """Return the operators that have Triton kernels of ours."""
    return [name for name in kernels.OPERATORS if name not in library.WITHOUT_KERNELS]


def verdict_of(name: str, dtype: torch.dtype, arguments, seed: int = 0) -> tuple[str, int, int]:
    """Run one call on the virtual GPU; return the verdict, the number of launches and that of findings."""
    operator, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
    gpu = virtual_gpu(seed=seed)
    try:
        with gpu:
            assert_call_matches(operator, reference, arguments, dtype)
        verdict = SOUND
    except NoKernelRan:
        verdict = "no kernel was launched"
    except KernelFaults as error:
        verdict = str(error)
    except AssertionError as error:
        verdict = f"wrong: {error}"
    return verdict, len(gpu.launches), len(gpu.findings)


def commit() -> str:
    """Return the commit of the tree, marked where the tree has changes."""
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def write_row(path: Path, row: dict[str, object]) -> None:
    """Put a row into the table in place of the same case's former one."""
    rows = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    key = ("operator", "dtype", "case")
    rows = [other for other in rows if any(other[name] != str(row[name]) for name in key)]
    rows = sorted([*rows, row], key=lambda row: (row["operator"], row["dtype"], int(row["case"])))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def selected(selections: list[str]) -> Iterator[tuple[str, str, int, Any]]:
    """Yield operator, type, number and arguments of each selected case, of all cases if nothing is selected."""
    for selection in selections or operators_with_kernels():
        name, dtype, case = (*selection.split(":"), "", "")[:3]
        for each in [dtype] if dtype else [str(dtype).removeprefix("torch.") for dtype in DTYPES]:
            for number, arguments in enumerate(ARGUMENTS[name]("cpu", getattr(torch, each))):
                if case in ("", str(number)):
                    yield name, each, number, arguments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("selections", nargs="*", metavar="OPERATOR[:DTYPE[:CASE]]")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    stamp = {"commit": commit(), "torch": version("torch"), "triton": version("triton")} if options.out else {}
    sound = True
    for name, dtype, case, arguments in selected(options.selections):
        start = time.process_time()
        verdict, launches, findings = verdict_of(name, getattr(torch, dtype), arguments)
        sound &= verdict == SOUND
        seconds = time.process_time() - start
        print(f"{name}:{dtype}:{case}: {verdict} ({launches} launches, {seconds:.1f} s)", flush=True)
        if options.out:
            row = {"operator": name, "dtype": dtype, "case": case, "verdict": " ".join(verdict.split())[:200]}
            write_row(options.out, row | {"launches": launches, "findings": findings} | stamp)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
