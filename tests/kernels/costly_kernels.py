"""Kernels that each break one rule of the ahead-of-time gate, to show that the gate sees it."""

from __future__ import annotations

import triton
import triton.language as tl

from trifuse.kernels.gpu.static_case import Budget, StaticCase


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offset, tl.load(x + offset, mask=offset < n), mask=offset < n)


@triton.jit
def sum_by_atomics_kernel(x, out, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out, tl.sum(tl.load(x + offset, mask=offset < n, other=0.0), 0))


@triton.jit
def spilling_kernel(x, out, n, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tile = tl.load(x + rows[:, None] * BLOCK + rows[None, :])
    for _ in range(n):
        tile = tile * tile + tl.exp(tile)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], tile)


def _case(name: str, kernel: object, block: int, aligned: tuple[str, ...], budget: Budget) -> StaticCase:
    return StaticCase(
        name=name,
        kernel=kernel,
        signature={"x": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"},
        constants={"BLOCK": block},
        aligned=aligned,
        budgets={"sm_90": budget, "gfx942": budget},
    )


_ALL = ("x", "out", "n")
STATIC_CASES = [
    _case("sound copy", copy_kernel, 1024, _ALL, Budget(registers=48, wide_loads=1, shuffles=0)),
    _case("copy, alignment forgotten", copy_kernel, 1024, (), Budget(registers=48, wide_loads=1, shuffles=0)),
    _case("copy, registers over budget", copy_kernel, 8192, _ALL, Budget(registers=16, wide_loads=1, shuffles=0)),
    _case("sum by atomics", sum_by_atomics_kernel, 1024, _ALL, Budget(registers=64, wide_loads=1, shuffles=99)),
    _case("sum, shuffles over budget", sum_by_atomics_kernel, 1024, _ALL, Budget(registers=64, wide_loads=1, shuffles=0)),
    _case("spilling tile", spilling_kernel, 256, _ALL, Budget(registers=255, wide_loads=0, shuffles=9999)),
]
