"""Count which instructions the launches of compiled kernels execute, from a few of their programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from trifuse.kernels import library

from .allocations import Allocations
from .arguments import bind
from .driver import Code, VirtualDriver, keep_ptx
from .machine import Program
from .machine import library as built_library
from .ptx import Kernel, read_ptx

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
    from trifuse.kernels.gpu.triton_internals import launching_through

    found: list[Executed] = []

    def run(code: Code, source: Any, metadata: Any, grid: tuple[int, int, int], values: tuple[Any, ...]) -> None:
        if grid[1:] != (1, 1):
            raise ValueError(f"expected a grid of one axis, as all kernels of trifuse have, got {grid}")
        program = _program(code.ptx, metadata.num_warps, metadata.shared)
        arguments = bind(program.kernel, source.signature, values, Allocations())
        some = sorted({(2 * k + 1) * grid[0] // (2 * PROGRAMS) for k in range(PROGRAMS)})
        counts = program.count(grid, arguments.parameters, arguments.memories, some)
        shares = tuple(count / (len(some) * metadata.num_warps) for count in counts)
        found.append(Executed(source, program.kernel, code.cubin, grid[0], metadata.num_warps, shares))

    built_library()
    with ExitStack() as block:
        block.enter_context(launching_through(VirtualDriver(run), keep_ptx))
        block.enter_context(library.compiled_on_cpu())
        block.enter_context(library.backend("triton", strict=False))
        block.enter_context(library.failed_builds_forgotten())
        yield found


@cache
def _program(ptx: str, warps: int, shared_bytes: int) -> Program:
    return Program(read_ptx(ptx), warps, shared_bytes)
