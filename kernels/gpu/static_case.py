"""How a Triton kernel is compiled without a GPU, and what it may cost there.

Every module of this folder lists its kernels as ``STATIC_CASES``; a test compiles each one for every target and holds
the machine code against the budget written beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NVIDIA_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
AMD_TARGETS = ("gfx942",)
TARGETS = NVIDIA_TARGETS + AMD_TARGETS


@dataclass(frozen=True)
class Budget:
    """What a compiled kernel may cost on one target. No kernel may spill or use atomics, whatever its budget.

    Args:
        registers: most registers per thread.
        wide_loads: fewest 128-bit loads from global memory in the code.
        shuffles: most exchanges between the threads of a warp in the code.
    """

    registers: int
    wide_loads: int
    shuffles: int


@dataclass(frozen=True)
class StaticCase:
    """One kernel, specialised as its launcher specialises it.

    Args:
        name: what is compiled, e.g. ``"forward, 12 maps, bfloat16"``.
        kernel: the ``triton.jit`` function.
        signature: type of each argument in order, e.g. ``"*bf16"``, ``"i64"``, ``"constexpr"``; a tuple of types for a
            tuple argument.
        constants: value of each constexpr argument, by name; element k of the tuple argument at position i is (i, k).
        aligned: names of the pointers and integers that are multiples of 16 at run time.
        budgets: one for each target; the library's own kernels have one for each of `TARGETS`.
        threads: threads per program, in warps of 32 on NVIDIA's GPUs and of 64 on AMD's.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[Any, ...]]
    constants: Mapping[str | tuple[int, ...], object]
    aligned: tuple[str, ...]
    budgets: Mapping[str, Budget]
    threads: int = 128
