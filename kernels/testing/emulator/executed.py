"""Count which instructions the launches of compiled kernels execute, from a few of their programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .allocations import Allocations
from .arguments import bind
from .driver import Code, kernels_run_by
from .machine import library
from .ptx import Kernel
from .virtual_gpu import program_of

PROGRAMS = 4  # of a launch, spread evenly


@dataclass(frozen=True)
class Executed:
    """A launch.

    Args:
        source: what Triton compiled: the function, the types of its arguments, its constants.
        kernel: its code as the machine runs it.
        cubin: its code as the GPU would take it.
        programs: how many there are.
        warps: of each program.
        counts: how often a warp executes each instruction of ``kernel``, on average over the programs that were run.
    """

    source: Any
    kernel: Kernel
    cubin: bytes
    programs: int
    warps: int
    counts: tuple[float, ...]


@contextmanager
def launches_counted() -> Iterator[list[Executed]]:
    """Compile every Triton kernel that is launched inside the block for an NVIDIA GPU, and run a few of its programs.

    Operators run on their kernels, on CPU tensors; their results are mostly missing, as most programs are not run.

    Yields:
        The launches, in order, filled while the block runs.
    """
    found: list[Executed] = []

    def run(code: Code, source: Any, metadata: Any, grid: tuple[int, int, int], values: tuple[Any, ...]) -> None:
        if grid[1:] != (1, 1):
            raise ValueError(f"expected a grid of one axis, as all kernels of trifuse have, got {grid}")
        program = program_of(code, source, metadata)
        arguments = bind(program.kernel, source.signature, values, Allocations())
        some = sorted({(2 * k + 1) * grid[0] // (2 * PROGRAMS) for k in range(PROGRAMS)})
        counts = program.count(grid, arguments.parameters, arguments.memories, some)
        shares = tuple(count / (len(some) * metadata.num_warps) for count in counts)
        found.append(Executed(source, program.kernel, code.cubin, grid[0], metadata.num_warps, shares))

    library()
    with kernels_run_by(run):
        yield found
