"""Damage files and read them: ``python tests/fuzz/run.py --target nifti --inputs 100000 --seed 1``.

Without ``--target`` all of them have their turn. What was run, and how many kinds of fault were found, is added to
``verdicts.csv`` with ``--record``; the shortest file of each kind is written below ``--out``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]
os.environ.setdefault("TRITON_INTERPRET", "1")

import checkpoint_readers  # noqa: E402 - the folders above are where they lie
from commands import COMMANDS  # noqa: E402
from engine import Target, fuzz, minimised  # noqa: E402
from readers import READERS  # noqa: E402

TARGETS = {target.name: target for target in (*READERS, *checkpoint_readers.READERS, *COMMANDS)}
VERDICTS = HERE / "verdicts.csv"
COLUMNS = ("target", "seed", "inputs", "refused", "finds", "commit")


def main() -> int:
    """Run what the command line asks for; return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="(all)")
    parser.add_argument("--inputs", type=int, default=1000, help="for each target (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is read (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each target, at most")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "build/fuzz", help="where finds go (%(default)s)")
    parser.add_argument("--record", action="store_true", help=f"add what was run to {VERDICTS.name}")
    arguments = parser.parse_args()
    found = 0
    for name in arguments.target:
        found += _run(TARGETS[name], arguments)
    return 1 if found else 0


def _run(target: Target, arguments: argparse.Namespace) -> int:
    begun_s = time.monotonic()
    result = fuzz(target, arguments.inputs, arguments.seed, arguments.seconds)
    rate = result.inputs / (time.monotonic() - begun_s)
    done = f"{result.inputs:8} inputs, {result.refused:8} refused, {rate:7.0f}/s"
    print(f"{target.name:20}{done}, {len(result.finds)} finds", flush=True)
    for find in result.finds.values():
        content = find.content if "killed" in find.what or "too long" in find.what else minimised(target, find)
        path = arguments.out / target.name / hashlib.sha256(find.what.encode()).hexdigest()[:8]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"    {find.what} ({find.count} times): {path}", flush=True)
    if arguments.record:
        row = (target.name, arguments.seed, result.inputs, result.refused, len(result.finds), _commit())
        _record(row)
    return len(result.finds)


def _record(row: tuple[object, ...]) -> None:
    """Add a row, in the place of an older one of the same target and seed."""
    rows = list(csv.reader(VERDICTS.open(newline=""))) if VERDICTS.exists() else []
    kept = [old for old in rows[1:] if old[:2] != [str(part) for part in row[:2]]]
    with VERDICTS.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([COLUMNS, *sorted([*kept, [str(part) for part in row]])])


def _commit() -> str:
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
