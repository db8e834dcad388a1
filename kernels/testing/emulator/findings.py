"""What the virtual GPU found, in words, and the errors that it raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trifuse.kernels.errors import TrifuseError

if TYPE_CHECKING:
    from .ptx import Place


class UnsupportedInstruction(TrifuseError, NotImplementedError):
    """A kernel needs what the virtual GPU does not have; the message names the instruction, the kernel and the line."""


class KernelFaults(TrifuseError, AssertionError):
    """Raised at the end of a block in which the virtual GPU found faults.

    Args:
        findings: all of them.
    """

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        one = len(findings) == 1  # which then is on the first line, all that a summary of tests shows
        head = f"{len(findings)} fault{'s' * (not one)} in compiled kernels:"
        super().__init__((" " if one else "\n").join([head, *map(str, findings)]))

    def __reduce__(self) -> tuple[type[KernelFaults], tuple[list[Finding]]]:
        return KernelFaults, (self.findings,)


for _error in (UnsupportedInstruction, KernelFaults):
    _error.__module__ = "trifuse.kernels.testing"  # from where they are imported


@dataclass(frozen=True)
class Finding:
    """One kind of fault at one place of a kernel.

    Args:
        kind: the fault, such as ``"out of bounds"``; all of them are in `KINDS`.
        kernel: the kernel's name.
        place: file and line of the source, and from where it was inlined.
        message: what happened, in a sentence.
        program: which program of the grid, (x, y, z); None where the fault belongs to no single one.
        thread: which thread of the program; None likewise.
        argument: the tensor argument that the address belongs to; empty if none.
        offset: bytes from the start of that tensor to the address; None where there is no address.
        count: how often it was seen.
    """

    kind: str
    kernel: str
    place: Place
    message: str
    program: tuple[int, int, int] | None = None
    thread: int | None = None
    argument: str = ""
    offset: int | None = None
    count: int = 1

    @property
    def file(self) -> str:
        """The source file."""
        return self.place.file

    @property
    def line(self) -> int:
        """The line in the source file."""
        return self.place.line

    def is_like(self, other: Finding) -> bool:
        """Return whether both tell of one fault: the same kind, line and argument."""
        return all(getattr(self, name) == getattr(other, name) for name in ("kind", "kernel", "place", "argument"))

    def __str__(self) -> str:
        times = "once" if self.count == 1 else f"{self.count} times"
        who = (
            "" if self.program is None else f" (seen {times}, first by thread {self.thread} of program {self.program})"
        )
        return f"{self.kind}: {self.kernel}, {self.place}: {self.message}{who}"


MOST_INSTRUCTIONS = 1 << 24  # of one program, counted by warps: with more, it is taken not to end
# By the numbers of `Fault` in findings.h.
KINDS = (
    "out of bounds",
    "misaligned",
    "uninitialised",
    "race between programs",
    "race between warps",
    "race between threads",
    "shared memory out of bounds",
    "shared memory misaligned",
    "race in shared memory",
    "divergent barrier",
    "inactive lane",
    "endless",
)
ORDER = "order of programs"
