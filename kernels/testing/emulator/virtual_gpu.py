"""Run compiled Triton kernels on CPU tensors, and check every access to memory."""

from __future__ import annotations

import math
import os
import random
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from trifuse.kernels.errors import BackendError, NoKernelRan

from .allocations import Allocations
from .findings import MOST_INSTRUCTIONS, Finding, KernelFaults
from .misuse import OfBlocks, no_decorator
from .ptx import read_ptx
from .reports import differences, finding_of

if TYPE_CHECKING:
    from types import TracebackType

    from .arguments import Arguments
    from .driver import Code
    from .machine import Program


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name and the grid of programs."""

    kernel: str
    grid: tuple[int, int, int]


class _Open(threading.local):
    """The blocks that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.blocks: list[virtual_gpu] = []


_open = _Open()
_owned = threading.RLock()  # by the thread that is in a block: what a block changes holds for the whole process
_launching = threading.RLock()
MOST_PROGRAMS = 1 << 24  # of a launch: they are run one after the other
LARGEST_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)


class virtual_gpu(metaclass=OfBlocks):
    """Run every Triton kernel that is launched inside the block as it is compiled for an NVIDIA GPU, on CPU tensors.

    Programs run one after the other, in a drawn order; each launch is run several times, and its results must be equal
    to the bit. Every access of every thread is checked; what is found is kept, and raised at the end of the block. The
    operators of `trifuse.kernels` run on their kernels inside the block, as in ``backend("triton", strict=False)``:
    what has no kernel raises. One thread at a time can be in such a block; blocks within blocks are fine.

    Args:
        seed: draws the orders of programs and of the warps within them, and what unwritten memory is filled with.
        orders: how often each launch is run, every second time in the order before turned round; at least 1.
        most_instructions: of one program, an instruction of a warp counted once: one with more is taken not to end.

    Attributes:
        findings: the faults found so far; see `Finding`. Clear the list to leave the block without an error.
        launches: the kernels that were launched.
        expects_launches: whether a block without any launch ends with an error; True unless set otherwise.

    Raises:
        KernelFaults: at the end of the block, if anything was found.
        NoKernelRan: at the end of the block, if no kernel was launched in it.
        UnsupportedInstruction: from the launch of a kernel that needs what the virtual GPU does not have.
        BackendError: where it cannot be: under TRITON_INTERPRET=1, without a C++ compiler, while another thread is in
            such a block; from a launch whose grid no GPU takes; from an operator that has no kernel for its tensors.

    Examples:
        >>> with virtual_gpu():  # doctest: +SKIP
        ...     add_kernel[(4,)](x, y, out, x.numel(), BLOCK=128)
    """

    def __init__(self, *, seed: int = 0, orders: int = 2, most_instructions: int = MOST_INSTRUCTIONS) -> None:
        for name, value in (("orders", orders), ("most_instructions", most_instructions)):
            if type(value) is not int:
                raise TypeError(f"{name}: expected an int of at least 1, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.findings: list[Finding] = []
        self.launches: list[Launch] = []
        self.orders = orders
        self.most_instructions = most_instructions
        self.expects_launches = True
        self._ran = False
        self._draw = random.Random(seed)
        self._allocations = Allocations(seed)
        self._block = ExitStack()

    def __enter__(self) -> virtual_gpu:
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise BackendError(
                "virtual_gpu runs compiled kernels, but TRITON_INTERPRET=1 lets Triton interpret them; unset it before "
                "triton is imported"
            )
        if self in _open.blocks:
            raise BackendError(
                "virtual_gpu: expected a block of its own for each object, got one that is in its block already; write "
                "virtual_gpu() for the inner block, too"
            )
        if not _owned.acquire(blocking=False):
            raise BackendError(
                "virtual_gpu: expected no other thread in such a block, as it changes the whole process, got one; run "
                "the blocks one after the other, or in processes of their own"
            )
        self._block.callback(_owned.release)
        try:
            self._enter()
        except BaseException:
            self._block.close()
            raise
        return self

    def _enter(self) -> None:
        from . import driver, machine

        machine.library()
        self._ran = False
        _open.blocks.append(self)
        self._block.callback(_open.blocks.remove, self)
        self._driver = self._block.enter_context(driver.kernels_run_by(self._launch))
        self._block.enter_context(self._allocations.tracked())

    def __call__(self, function: object) -> None:
        """Refuse to decorate a function."""
        raise no_decorator(function)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        self._block.close()
        for block in _open.blocks:
            block._ran |= self._ran
        if self.findings and error is not None:
            error.add_note(str(KernelFaults(self.findings)))
        elif self.findings:
            raise KernelFaults(self.findings)
        elif error is None and self.expects_launches and not self._ran:
            raise NoKernelRan(
                "virtual_gpu: expected a Triton kernel to be launched in the block, got none, so nothing was checked; "
                "launch kernels inside, on CPU tensors, or take the block away"
            )

    def _launch(self, *launch: Any) -> None:
        self._ran = True
        with _launching:
            self._launch_alone(*launch)

    def _launch_alone(
        self, code: Code, source: Any, metadata: Any, grid: tuple[int, int, int], values: tuple[Any, ...]
    ) -> None:
        from .arguments import bind

        _check_grid(source.fn.fn.__name__, grid)

        program = program_of(code, source, metadata)
        arguments = bind(program.kernel, source.signature, values, self._allocations)
        self.launches.append(Launch(program.kernel.name, grid))
        for finding in self._found_in_all_orders(program, grid, arguments):
            self._add(finding)

    def _found_in_all_orders(self, program: Program, grid: tuple[int, int, int], arguments: Arguments) -> list[Finding]:
        """Run a launch in one order after the other, up to one in which something is found."""
        before = arguments.contents()
        seed = self._draw.getrandbits(64)
        found, stored = self._run(program, grid, arguments, seed, backward=False)
        first = arguments.contents() if self.orders > 1 and not found else []
        for turn in range(1, self.orders):
            if found:
                break
            backward = turn % 2 == 1
            seed = seed if backward else self._draw.getrandbits(64)
            arguments.restore(before, stored)
            found, stored_now = self._run(program, grid, arguments, seed, backward)
            if not found:
                found = differences(program.kernel, arguments, first, arguments.contents())
            stored = [one or other for one, other in zip(stored, stored_now, strict=True)]
        return found

    def _run(
        self, program: Program, grid: tuple[int, int, int], arguments: Arguments, seed: int, backward: bool
    ) -> tuple[list[Finding], list[bool]]:
        """Run all programs in one order; return the findings, and which storages were written to."""
        records, stored = program.run(
            grid, arguments.parameters, arguments.memories, random.Random(seed), backward, self.most_instructions
        )
        return [finding_of(program.kernel, grid, arguments, record) for record in records], stored

    def _add(self, finding: Finding) -> None:
        """Keep a finding; one for all that tell of the same fault at the same line."""
        for number, known in enumerate(self.findings):
            if known.is_like(finding):
                self.findings[number] = replace(known, count=known.count + finding.count)
                return
        self.findings.append(finding)


def program_of(code: Code, source: Any, metadata: Any) -> Program:
    """Return the kernel that Triton launches, made ready for the machine."""
    return _program(code.ptx, source.fn.fn.__code__.co_filename, metadata.num_warps, metadata.shared)


@cache
def _program(ptx: str, file: str, warps: int, shared_bytes: int) -> Program:
    """Read a kernel, once in a process."""
    from .machine import Program

    return Program(read_ptx(ptx, file), warps, shared_bytes)


def _check_grid(kernel: str, grid: tuple[int, int, int]) -> None:
    """Refuse what CUDA refuses, and more programs than are ever run one after the other."""
    for axis, size, largest in zip("xyz", grid, LARGEST_GRID, strict=True):
        if not 0 <= size <= largest:
            raise BackendError(
                f"{kernel}: expected a grid of 0 to {largest} programs along {axis}, as on a GPU, got {grid}; let each "
                "program do more, or use another axis"
            )
    if math.prod(grid) > MOST_PROGRAMS:
        raise BackendError(
            f"{kernel}: expected at most {MOST_PROGRAMS} programs, as the virtual GPU runs them one after the other, "
            f"got {grid}; check a smaller tensor"
        )
