"""Kernels that each break one rule of the ahead-of-time gate, named after it; their budgets are in the table beside."""

from __future__ import annotations

import triton
import triton.language as tl

from trifuse.benchmarks.static_cases.case import StaticCase


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offset, tl.load(x + offset, mask=offset < n), mask=offset < n)


@triton.jit
def sum_kernel(x, out, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + offset, mask=offset < n, other=0.0), 0))


@triton.jit
def sum_by_atomics_kernel(x, out, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out, tl.sum(tl.load(x + offset, mask=offset < n, other=0.0), 0))


@triton.jit
def spilling_kernel(x, out, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tile = tl.load(x + offset)
    for _ in range(n):
        tile = tile * tile + tile
    tl.store(out + offset, tile)


@triton.jit
def forgotten_kernel(x):
    tl.store(x, 0.0)


def _case(name: str, kernel: object, block: int, aligned: str = "x out n") -> StaticCase:
    return StaticCase(
        name=name,
        kernel=kernel,
        signature={"x": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"},
        constants={"BLOCK": block},
        aligned=tuple(aligned.split()),
    )


STATIC_CASES = [
    _case("sound", copy_kernel, 1024),
    _case("wide loads", copy_kernel, 1024, aligned=""),
    _case("registers", copy_kernel, 8192),
    _case("shuffles", sum_kernel, 1024),
    _case("atomics", sum_by_atomics_kernel, 1024),
    _case("spills on NVIDIA's", spilling_kernel, 32768),
    _case("spills on AMD's", spilling_kernel, 131072),
]
