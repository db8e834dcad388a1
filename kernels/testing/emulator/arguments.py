"""The arguments of a launch as the kernel's parameters: bytes in its memory, and the storages that it may touch."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .allocations import Allocations, snapshot, storage_bytes
from .findings import UnsupportedInstruction
from .machine import Memory, address_of
from .ptx import Kernel

# Triton's names of types, and how a value of them lies in memory.
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B", "u16": "H", "u32": "I"}
FORMATS |= {"u64": "Q", "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d"}


@dataclass
class Arguments:
    """What a launch passes on.

    Args:
        parameters: the bytes of all parameters.
        tensors: the tensors among the arguments, by the kernel's names of them.
        storages: number of each tensor's storage among the memories.
        memories: the storages.
        kept: one tensor for each storage.
        flags: for each storage, one per byte that tells whether it was written; None where all bytes were.
    """

    parameters: bytes = b""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    storages: dict[str, int] = field(default_factory=dict)
    memories: list[Memory] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    flags: list[Tensor | None] = field(default_factory=list)

    def contents(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return copies of the bytes of all storages, and of their flags."""
        flags = [None if flags is None else flags.clone() for flags in self.flags]
        return list(zip(map(snapshot, self.kept), flags, strict=True))

    def restore(self, contents: list[tuple[Tensor, Tensor | None]], stored: list[bool]) -> None:
        """Put the contents back that storages had before they were stored to."""
        for tensor, flags, (former, former_flags), wrote in zip(self.kept, self.flags, contents, stored, strict=True):
            if wrote:
                storage_bytes(tensor).copy_(former)
            if flags is not None and former_flags is not None:
                flags.copy_(former_flags)


def bind(kernel: Kernel, signature: dict[str, Any], values: Sequence[Any], allocations: Allocations) -> Arguments:
    """Lay the arguments of a launch out as the parameters of its kernel.

    Args:
        kernel: whose parameters they are.
        signature: type of each argument; nested tuples for tuples.
        values: the arguments.
        allocations: that know which bytes were never written.

    Raises:
        UnsupportedInstruction: for what the machine has no memory for, such as descriptors of tensors.
    """
    arguments = Arguments()
    flat = list(_flat(tuple(signature.values()), tuple(values), tuple(signature)))
    for name, _, value in flat:
        if isinstance(value, Tensor):
            _check(kernel, name, value)
            arguments.tensors[name] = value
    _number_storages(arguments, allocations)
    fields = [_bytes_of(kernel, arguments, name, kind, value) for name, kind, value in flat]
    scratch = len(kernel.parameters) - len(fields)  # pointers that Triton adds, to memory that no kernel here needs
    if not 0 <= scratch <= 2:
        raise UnsupportedInstruction(
            f"{kernel.name} has {len(kernel.parameters)} parameters and {len(fields)} arguments; the virtual GPU does "
            "not know this version of Triton"
        )
    fields += [bytes(8)] * scratch
    end = max((start + size for size, start in kernel.parameters), default=0)
    memory = bytearray(end + 8)
    for (size, start), bits in zip(kernel.parameters, fields, strict=True):
        memory[start : start + size] = bits.ljust(size, b"\0")
    arguments.parameters = bytes(memory)
    return arguments


def _flat(kinds: Any, values: Any, names: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield name, type and value of each argument that is a parameter, tuples taken apart."""
    for name, kind, value in zip(names, kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value, [f"{name}[{k}]" for k in range(len(kind))])
        elif kind != "constexpr":
            yield name, kind, value


def _check(kernel: Kernel, name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise UnsupportedInstruction(
            f"{kernel.name}: {name} is on {tensor.device}; the virtual GPU runs on CPU tensors: move it with .cpu()"
        )
    if tensor.layout is not torch.strided or tensor.untyped_storage().device.type != "cpu":
        raise UnsupportedInstruction(
            f"{kernel.name}: expected {name} to be a CPU tensor with memory, got a {type(tensor).__name__} of layout "
            f"{tensor.layout}; pass a dense tensor, made outside of modes that make fake ones"
        )


def _number_storages(arguments: Arguments, allocations: Allocations) -> None:
    numbers: dict[int, int] = {}
    granules: list[int] = []
    for name, tensor in arguments.tensors.items():
        key = tensor.untyped_storage()._cdata
        number = numbers.setdefault(key, len(numbers))
        if number == len(granules):
            granules.append(tensor.itemsize)
            arguments.kept.append(tensor)
        granules[number] = min(granules[number], tensor.itemsize)
        arguments.storages[name] = number
    for tensor, granule in zip(arguments.kept, granules, strict=True):
        storage = tensor.untyped_storage()
        flags = allocations.flags(tensor)
        arguments.flags.append(flags)
        written = 0 if flags is None else flags.data_ptr()
        arguments.memories.append(Memory(storage.data_ptr(), storage.nbytes(), written, granule))


def _bytes_of(kernel: Kernel, arguments: Arguments, name: str, kind: str, value: Any) -> bytes:
    if isinstance(value, Tensor):
        memory = arguments.memories[arguments.storages[name]]
        start = address_of(arguments.storages[name], memory.data)
        return struct.pack("<Q", start + value.storage_offset() * value.itemsize)
    if kind.startswith("*"):  # a bare address, or None
        return struct.pack("<Q", 0 if value is None else int(getattr(value, "data_ptr", lambda: value)()))
    if kind == "bf16":
        return torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    if kind not in FORMATS:
        raise UnsupportedInstruction(f"{kernel.name}: the virtual GPU has no arguments of type {kind} ({name})")
    return struct.pack(f"<{FORMATS[kind]}", value)
