"""Put what the machine recorded into words: which argument, which program, which line, against which other line."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .arguments import Arguments
from .findings import KINDS, ORDER, Finding
from .machine import NOBODY, Record
from .ptx import Kernel

Grid = tuple[int, int, int]
Contents = tuple[Tensor, Tensor | None]  # the bytes of a storage, and which of them were written


def finding_of(kernel: Kernel, grid: Grid, arguments: Arguments, record: Record) -> Finding:
    """Return a finding in the words of the kernel's source."""
    kind = KINDS[record.fault]
    name, offset = _argument(arguments, record)
    return Finding(
        kind=kind,
        kernel=kernel.name,
        place=kernel.place(record.position),
        message=_message(kind, kernel, grid, arguments, record, name, offset),
        program=_program(record.program, grid),
        thread=record.thread,
        argument=name,
        offset=offset,
        count=record.count,
    )


def differences(
    kernel: Kernel, arguments: Arguments, first: Sequence[Contents], second: Sequence[Contents]
) -> list[Finding]:
    """Return a finding for each storage that two orders of the programs left with different bytes."""
    found = []
    for number, ((one, _), (other, _)) in enumerate(zip(first, second, strict=True)):
        differing = (one != other).nonzero()
        if len(differing):
            name = next(name for name, storage in arguments.storages.items() if storage == number)
            tensor = arguments.tensors[name]
            offset = int(differing[0]) - int(tensor.storage_offset()) * tensor.itemsize
            depend = "depends" if len(differing) == 1 else "depend"
            message = (
                f"{_bytes(len(differing))} of {name} {depend} on the order of programs, the first at byte {offset}; "
                "where float atomics are meant to add in any order, write virtual_gpu(orders=1)"
            )
            found.append(Finding(ORDER, kernel.name, kernel.place(0), message, argument=name, offset=offset))
    return found


def _bytes(count: int) -> str:
    return f"{count} byte{'s' * (count != 1)}"


def _program(number: int, grid: Grid) -> Grid:
    return number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1]


def _argument(arguments: Arguments, record: Record) -> tuple[str, int | None]:
    """Return the tensor that an address belongs to, and the bytes from its first element to there."""
    if record.storage == NOBODY:
        return "", record.offset if KINDS[record.fault].startswith(("shared", "race in")) else None
    names = [name for name, storage in arguments.storages.items() if storage == record.storage]

    def offset(name: str) -> int:
        tensor = arguments.tensors[name]
        bytes_in: int = record.offset - tensor.storage_offset() * tensor.itemsize
        return bytes_in

    def reaches(name: str) -> bool:
        tensor = arguments.tensors[name]
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.numel() > 0 and 0 <= offset(name) < (last + 1) * tensor.itemsize

    name = next(filter(reaches, names), names[0])
    return name, offset(name)


def _message(
    kind: str, kernel: Kernel, grid: Grid, arguments: Arguments, record: Record, name: str, offset: int | None
) -> str:
    does = "stores" if record.is_store else "loads"
    if kind == "divergent barrier":
        others = "have ended" if record.other_position == NOBODY else "wait at another one"
        return f"some threads wait at this barrier while others {others}"
    if kind == "inactive lane":
        return f"a thread takes the value of lane {record.offset} of its warp, which does not take part"
    if kind == "endless":
        return "the program has not ended after as many instructions as `most_instructions` of virtual_gpu allows"
    if record.storage == NOBODY and offset is None:
        return f"{does} {_bytes(record.bytes)} at {record.offset & (1 << 64) - 1:#x}, an address in no tensor argument"
    where = f"{does} {_bytes(record.bytes)} at byte {offset} of {name or 'shared memory'}"
    if "out of bounds" in kind:
        if not name:
            return f"{where}, beyond what the program has"
        tensor = arguments.tensors[name]
        room = int(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize)
        are = "is" if room == 1 else "are"
        return f"{where}, of which {_bytes(room)} {are} there (shape {tuple(tensor.shape)}, {tensor.dtype})"
    if "misaligned" in kind:
        return f"{where}, an address that is no multiple of {record.bytes}"
    if kind == "uninitialised":
        return f"{where}, which nothing has written"
    return f"{where}, {_other_side(kind, kernel, grid, record)}"


def _other_side(kind: str, kernel: Kernel, grid: Grid, record: Record) -> str:
    other = kernel.place(record.other_position)
    if kind == "race between threads":
        return "to which the same store writes another value, from another thread or another part of its block"
    if kind == "race between programs":
        who = (
            "several programs" if record.other_program == NOBODY else f"program {_program(record.other_program, grid)}"
        )
        return f"which {who} accessed at {other}: nothing puts the two in an order"
    who = "several warps" if record.other_warp == NOBODY else f"warp {record.other_warp}"
    return f"which {who} of the same program accessed at {other}, with no barrier between"
