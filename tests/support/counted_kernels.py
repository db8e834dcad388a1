"""Kernels whose executed instructions are known; run as a program, it prints what is counted of them.

Runs in a process of its own, without TRITON_INTERPRET, as an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import json
from collections import Counter

import torch
import triton
import triton.language as tl

from trifuse.benchmarks.reporting.issue_time import launch_row
from trifuse.kernels.gpu import launching
from trifuse.kernels.testing.emulator.executed import launches_counted


@triton.jit
def straight_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) * 2.0)


@triton.jit
def looped_kernel(x, out, rounds, BLOCK: tl.constexpr):
    """Add up blocks of x, as many as ``rounds`` and the number of the program say."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(rounds + tl.program_id(0)):
        total += tl.load(x + k * BLOCK + at)
    tl.store(out + tl.program_id(0) * BLOCK + at, total)


@triton.jit
def nested_kernel(x, out, rounds, BLOCK: tl.constexpr, INNER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(rounds):
        tl.store(out + k * BLOCK + at, total)
        for j in range(INNER):
            total += tl.exp2(tl.load(x + (k + j) * BLOCK + at))
    tl.store(out + at, total)


LAUNCHES = {
    "straight": (straight_kernel, 8, 4, (), {}),
    "looped": (looped_kernel, 4, 4, (5,), {}),
    "looped once": (looped_kernel, 1, 2, (13,), {}),
    "nested": (nested_kernel, 1, 4, (3,), {"INNER": 50}),
}


def main() -> None:
    found = {}
    for name, (kernel, programs, warps, rounds, constants) in LAUNCHES.items():
        x, out = torch.zeros(1 << 14), torch.zeros(1 << 14)
        with launches_counted() as launches:
            launching.launch(kernel, (programs,), x, out, *rounds, BLOCK=32 * warps, num_warps=warps, **constants)
        (launch,) = launches
        kinds: Counter[str] = Counter()
        for instruction, count in zip(launch.kernel.instructions, launch.counts, strict=True):
            words = instruction.text.split()
            kinds[(words[1] if words[0].startswith("@") else words[0])[:9]] += count
        found[name] = {"ptx": kinds, "row": launch_row(launch)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
