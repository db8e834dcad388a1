"""Run compiled Triton kernels on CPU tensors, and check every access to memory."""

from __future__ import annotations

import os
import random
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from trifuse.kernels import library
from trifuse.kernels.errors import BackendError

from .allocations import Allocations, snapshot, storage_bytes
from .findings import Finding, KernelFaults
from .ptx import read_ptx
from .reports import differences, finding_of

if TYPE_CHECKING:
    from types import TracebackType

    from .arguments import Arguments
    from .machine import Program


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name and the grid of programs."""

    kernel: str
    grid: tuple[int, int, int]


class virtual_gpu:
    """Run every Triton kernel that is launched inside the block as it is compiled for an NVIDIA GPU, on CPU tensors.

    Programs run one after the other, in a drawn order; each launch is run several times, and its results must be equal
    to the bit. Every access of every thread is checked; what is found is kept, and raised at the end of the block. The
    operators of `trifuse.kernels` choose their kernels for CPU tensors inside the block.

    Args:
        seed: draws the orders of programs and of the warps within them.
        orders: how often each launch is run, every second time in the order before turned round; at least 1.

    Attributes:
        findings: the faults found so far; see `Finding`. Clear the list to leave the block without an error.
        launches: the kernels that were launched.

    Raises:
        KernelFaults: at the end of the block, if anything was found.
        UnsupportedInstruction: from the launch of a kernel that needs what the virtual GPU does not have.
        BackendError: where it cannot be: under TRITON_INTERPRET=1, or without a C++ compiler.

    Example::

        with virtual_gpu():
            add_kernel[(4,)](x, y, out, x.numel(), BLOCK=128)
    """

    def __init__(self, *, seed: int = 0, orders: int = 2) -> None:
        if orders < 1:
            raise ValueError(f"orders: expected at least 1, got {orders}")
        self.findings: list[Finding] = []
        self.launches: list[Launch] = []
        self.orders = orders
        self._draw = random.Random(seed)
        self._allocations = Allocations()
        self._block = ExitStack()

    def __enter__(self) -> virtual_gpu:
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise BackendError(
                "virtual_gpu runs compiled kernels, but TRITON_INTERPRET=1 lets Triton interpret them; unset it before "
                "triton is imported"
            )
        from trifuse.kernels.gpu.triton_internals import launching_through

        from . import driver, machine

        machine.library()
        self._driver = driver.VirtualDriver(self._launch)
        self._block.enter_context(launching_through(self._driver, driver.keep_ptx))
        self._block.enter_context(library.compiled_on_cpu())
        self._block.enter_context(self._allocations.tracked())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._block.close()
        if not self.findings:
            return
        if error is None:
            raise KernelFaults(self.findings)
        error.add_note(str(KernelFaults(self.findings)))

    def _launch(
        self, ptx: str, source: Any, metadata: Any, grid: tuple[int, int, int], values: tuple[Any, ...]
    ) -> None:
        from .arguments import bind

        program = _program(ptx, source.fn.fn.__code__.co_filename, metadata.num_warps, metadata.shared)
        arguments = bind(program.kernel, source.signature, values, self._allocations)
        self.launches.append(Launch(program.kernel.name, grid))
        before = [snapshot(tensor) for tensor in arguments.kept]
        seed = self._draw.getrandbits(64)
        found, stored = self._run(program, grid, arguments, seed, backward=False)
        if self.orders > 1 and not found:
            first = [snapshot(tensor) for tensor in arguments.kept]
            for turn in range(1, self.orders):
                backward = turn % 2 == 1
                seed = seed if backward else self._draw.getrandbits(64)
                for tensor, content, wrote in zip(arguments.kept, before, stored, strict=True):
                    if wrote:
                        storage_bytes(tensor).copy_(content)
                self._run(program, grid, arguments, seed, backward)
                found += differences(program.kernel, arguments, first, [snapshot(tensor) for tensor in arguments.kept])
        for finding in found:
            self._add(finding)

    @staticmethod
    def _run(
        program: Program, grid: tuple[int, int, int], arguments: Arguments, seed: int, backward: bool
    ) -> tuple[list[Finding], list[bool]]:
        """Run all programs in one order; return the findings, and which storages were written to."""
        records, stored = program.run(grid, arguments.parameters, arguments.memories, random.Random(seed), backward)
        return [finding_of(program.kernel, grid, arguments, record) for record in records], stored

    def _add(self, finding: Finding) -> None:
        """Keep a finding; one for all that tell of the same fault at the same line."""
        for number, known in enumerate(self.findings):
            if known.is_like(finding):
                self.findings[number] = replace(known, count=known.count + finding.count)
                return
        self.findings.append(finding)


@cache
def _program(ptx: str, file: str, warps: int, shared_bytes: int) -> Program:
    """Read a kernel, once in a process."""
    from .machine import Program

    return Program(read_ptx(ptx, file), warps, shared_bytes)
