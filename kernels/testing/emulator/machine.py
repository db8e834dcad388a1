"""The machine that runs a kernel's instructions: C++ beside this file, built once with Triton's own builder."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trifuse.kernels.errors import BackendError

from .findings import MOST_INSTRUCTIONS
from .ptx import Kernel

FOLDER = Path(__file__).parent
NAME = "trifuse_virtual_gpu"
FLAGS = ("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
MOST_FINDINGS = 1000
NOBODY = -1
SLICE = 1 << 22  # instructions run in one piece, so that a launch can be interrupted: about a tenth of a second
# Every storage has a range of addresses of its own, see memory.h.
RANGE_BITS, FIRST_RANGE = 44, 1 << 12
# How much further from the start of its range each storage begins than the one before, so that no round offset leads
# from one to the same place in another; and for how many storages there is room.
SHIFT, SHIFTED = 0x9E377_9B90, 100


class Record(ctypes.Structure):
    """A finding as the machine writes it, see findings.h."""

    _fields_ = (
        ("fault", ctypes.c_int32),
        ("is_store", ctypes.c_int32),
        ("position", ctypes.c_uint32),
        ("other_position", ctypes.c_int32),
        ("program", ctypes.c_uint32),
        ("thread", ctypes.c_uint32),
        ("other_program", ctypes.c_int32),
        ("other_warp", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("storage", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("count", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Memory:
    """A storage that a launch may touch.

    Args:
        data: address of its first byte on the host.
        size: in bytes.
        written: address of one flag per byte that tells whether it was written; 0 where all bytes were.
        granule: bytes of the smallest elements in it, a power of two.
    """

    data: int
    size: int
    written: int
    granule: int


def address_of(number: int, data: int) -> int:
    """Return where the kernel finds the first byte of a storage: aligned to 16 bytes as far as on the host."""
    middle = (1 << RANGE_BITS - 1) + number % SHIFTED * SHIFT
    return (FIRST_RANGE + number << RANGE_BITS) + middle + data % 16


@cache
def library() -> ctypes.CDLL:
    """Build the machine unless Triton's cache has it, and load it."""
    from trifuse.kernels.gpu.triton_internals import cache_folder, get_cache_manager

    sources = {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(FOLDER.iterdir())
        if path.suffix in (".h", ".cpp")
    }
    key = hashlib.sha256(repr((sources, FLAGS, platform.platform(), _processor())).encode()).hexdigest()
    file, digest = f"{NAME}.so", f"{NAME}.sha256"
    try:
        kept = get_cache_manager(key)
        path, digest_path = kept.get_file(file), kept.get_file(digest)
        if path is None or digest_path is None or Path(digest_path).read_text() != _digest(Path(path).read_bytes()):
            folder = cache_folder(kept)
            print(f"trifuse builds the virtual GPU, once, into {folder}: half a minute to two", file=sys.stderr)
            built = _built()
            path = kept.put(built, file, binary=True)
            kept.put(_digest(built), digest, binary=False)
    except OSError as error:
        raise BackendError(
            f"virtual_gpu: expected a folder for Triton's cache that can be written to, got: {error}; set "
            "TRITON_CACHE_DIR to one"
        ) from error
    loaded = ctypes.CDLL(path)
    loaded.program_new.restype = loaded.machine_new.restype = ctypes.c_void_p
    loaded.machine_run.restype = loaded.machine_findings.restype = ctypes.c_uint32
    loaded.machine_stored.restype = ctypes.c_bool
    return loaded


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _built() -> bytes:
    from trifuse.kernels.gpu.triton_internals import build_shared_library

    with tempfile.TemporaryDirectory() as folder:
        source = str(FOLDER / "machine.cpp")
        try:
            built = build_shared_library(NAME, source, folder, [], [str(FOLDER)], ["stdc++"], list(FLAGS))
        except Exception as error:
            raise BackendError(_advice(error)) from error
        return Path(built).read_bytes()


def _processor() -> str:
    """Return what tells processors apart that understand different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _advice(error: Exception) -> str:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "none was found"
    return (
        "virtual_gpu builds its machine with a C++ compiler that knows C++20 (g++ 10 or clang 12, or newer), and could "
        f"not (compiler: {compiler}; {error}); install one, with Debian: apt-get install g++"
    )


class Program:
    """A kernel made ready for a number of warps."""

    def __init__(self, kernel: Kernel, warps: int, shared_bytes: int) -> None:
        self.kernel, self.warps = kernel, warps
        refused = ctypes.c_uint32()
        widths = " ".join(map(str, kernel.widths))
        self.handle = library().program_new(
            "\n".join(kernel.code).encode(),
            widths.encode(),
            shared_bytes,
            kernel.local_bytes,
            kernel.tables,
            len(kernel.tables),
            warps,
            ctypes.byref(refused),
        )
        if not self.handle:
            raise kernel.refusal(refused.value)

    def run(
        self,
        grid: tuple[int, int, int],
        parameters: bytes,
        memories: Sequence[Memory],
        draw: random.Random,
        backward: bool,
        most_instructions: int = MOST_INSTRUCTIONS,
    ) -> tuple[list[Record], list[bool]]:
        """Run every program of a grid once.

        Args:
            grid: programs along each axis.
            parameters: the kernel's parameters, as they lie in its memory.
            memories: the storages that it may touch.
            draw: draws the order of the programs, and of the warps within each.
            backward: whether the drawn order is turned round. Races show in one order, and are not looked for in the
                other.
            most_instructions: of one program, counted by warps: one with more is taken not to end.

        Returns:
            What was found, and for each storage whether the launch wrote to it.
        """
        programs, warps = list(range(math.prod(grid))), list(range(self.warps))
        draw.shuffle(programs)
        draw.shuffle(warps)
        if backward:
            programs.reverse()
            warps.reverse()
        with self._machine(grid, parameters, memories, not backward, most_instructions) as machine:
            _run_programs(machine, programs, warps)
            records = (Record * MOST_FINDINGS)()
            count = library().machine_findings(machine, records, MOST_FINDINGS)
            stored = [library().machine_stored(machine, number) for number in range(len(memories))]
            return list(records[: min(count, MOST_FINDINGS)]), stored

    def count(
        self, grid: tuple[int, int, int], parameters: bytes, memories: Sequence[Memory], programs: Sequence[int]
    ) -> list[int]:
        """Run some programs of a grid; return how often warps ran each instruction, in all of them together.

        What other programs would have written before is not there.

        Args:
            grid: programs along each axis.
            parameters: the kernel's parameters, as they lie in its memory.
            memories: the storages that it may touch.
            programs: the numbers of those to run.
        """
        counts = (ctypes.c_uint64 * len(self.kernel.code))()
        with self._machine(grid, parameters, memories, False, MOST_INSTRUCTIONS) as machine:
            _run_programs(machine, programs, range(self.warps))
            library().machine_counts(machine, counts)
        return list(counts)

    @contextmanager
    def _machine(
        self,
        grid: tuple[int, int, int],
        parameters: bytes,
        memories: Sequence[Memory],
        checks_races: bool,
        most_instructions: int,
    ) -> Iterator[ctypes.c_void_p]:
        machine = ctypes.c_void_p(
            library().machine_new(
                ctypes.c_void_p(self.handle),
                parameters,
                (ctypes.c_uint32 * 3)(*grid),
                ctypes.c_bool(checks_races),
                ctypes.c_uint64(most_instructions),
            )
        )
        try:
            for number, memory in enumerate(memories):
                library().machine_add_storage(
                    machine,
                    ctypes.c_void_p(memory.data),
                    ctypes.c_int64(memory.size),
                    ctypes.c_uint64(address_of(number, memory.data)),
                    ctypes.c_void_p(memory.written),
                    memory.granule,
                )
            yield machine
        finally:
            library().machine_delete(machine)


def _run_programs(machine: ctypes.c_void_p, programs: Sequence[int], warps: Sequence[int]) -> None:
    total = len(programs)
    listed, warp_order = (ctypes.c_uint32 * total)(*programs), (ctypes.c_uint32 * len(warps))(*warps)
    at, endless = 0, ctypes.c_bool()
    while at < total and not endless:
        at += library().machine_run(
            machine,
            ctypes.byref(listed, 4 * at),
            total - at,
            warp_order,
            ctypes.c_uint64(SLICE),
            ctypes.byref(endless),
        )
