"""Kernels with one planted fault each, and sound twins; run as a program, it prints what the virtual GPU finds in them.

Runs in a process of its own, without TRITON_INTERPRET, as an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager

import torch
import triton
import triton.language as tl

from trifuse.kernels.testing.emulator import KernelFaults, UnsupportedInstruction, virtual_gpu

N = 1000
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


@case
def sound():
    x, y, out = torch.randn(N), torch.randn(N), torch.empty(N)
    add_kernel[(8,)](x, y, out, N, BLOCK=128)
    assert torch.equal(out, x + y)


@triton.jit
def load_past_the_end_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at <= n)  # FAULT: out_of_bounds_load
    tl.store(out + at, values, mask=at < n)


@case
def out_of_bounds_load():
    load_past_the_end_kernel[(8,)](torch.randn(N), torch.empty(N), N, BLOCK=128)


@triton.jit
def store_before_the_start_kernel(out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at - 1, at)  # FAULT: out_of_bounds_store


@case
def out_of_bounds_store():
    store_before_the_start_kernel[(1,)](torch.empty(128, dtype=torch.int32), BLOCK=128)


@triton.jit(do_not_specialize=["start"])
def false_hint_kernel(x, out, start, BLOCK: tl.constexpr):
    at = tl.max_contiguous(tl.multiple_of(start + tl.arange(0, BLOCK), BLOCK), BLOCK)
    values = tl.load(x + at)  # FAULT: misaligned
    tl.store(out + tl.arange(0, BLOCK), values)


@case
def misaligned():
    false_hint_kernel[(1,)](torch.randn(1024), torch.empty(512), 1, BLOCK=512)


@case
def aligned():
    false_hint_kernel[(1,)](torch.randn(1024), torch.empty(512), 4, BLOCK=512)


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n)  # FAULT: uninitialised
    tl.store(out + at, values, mask=at < n)


@case
def uninitialised():
    half = torch.empty(N)
    copy_kernel[(4,)](torch.randn(N // 2), half, N // 2, BLOCK=128)
    copy_kernel[(8,)](half, torch.empty(N), N, BLOCK=128)


@case
def initialised():
    by_kernel, by_torch, past_torch = torch.empty(N), torch.empty(N), torch.empty(N)
    copy_kernel[(8,)](torch.randn(N), by_kernel, N, BLOCK=128)
    by_torch.normal_()
    past_torch.numpy()[:] = 1.0
    for x in (by_kernel, by_torch, past_torch, torch.zeros(N)):
        copy_kernel[(8,)](x, torch.empty(N), N, BLOCK=128)


@triton.jit
def one_too_many_kernel(out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(out + at, at, mask=(at < n) & (at <= (tl.program_id(0) + 1) * BLOCK))  # FAULT: race_between_programs


@case
def race_between_programs():
    one_too_many_kernel[(4,)](torch.empty(512, dtype=torch.int32), 512, BLOCK=128)


@triton.jit
def reverse_kernel(x, out, buffer, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(buffer + at, tl.load(x + at))
    if BARRIER:
        tl.debug_barrier()
    values = tl.load(buffer + BLOCK - 1 - at)  # FAULT: missing_barrier
    tl.store(out + at, values)


@case
def missing_barrier():
    reverse_kernel[(1,)](torch.randn(512), torch.empty(512), torch.empty(512), BARRIER=False, BLOCK=512)


@case
def with_barrier():
    x, out = torch.randn(512), torch.empty(512)
    reverse_kernel[(1,)](x, out, torch.empty(512), BARRIER=True, BLOCK=512)
    assert torch.equal(out, x.flip(0))


@triton.jit
def two_to_one_kernel(out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at // 2, at)  # FAULT: race_between_threads


@case
def race_between_threads():
    two_to_one_kernel[(1,)](torch.empty(64, dtype=torch.int32), BLOCK=128)


@triton.jit
def sum_kernel(x, out, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    total = tl.sum(values, axis=0)  # FAULT: missing_barrier_in_shared_memory
    tl.store(out, total)


@contextmanager
def edited(gpu, *change):
    """Launch with a text of the compiled PTX replaced."""
    launch = gpu._launch

    def launch_edited(code, *rest):
        assert change[0] in code.ptx
        launch(code._replace(ptx=code.ptx.replace(*change)), *rest)

    gpu._driver.run = launch_edited
    yield
    gpu._driver.run = launch


@case
def sum_of_warps():
    x, out = torch.arange(512.0), torch.empty(1)
    sum_kernel[(1,)](x, out, BLOCK=512)
    assert out.item() == x.sum()


@case
def missing_barrier_in_shared_memory(gpu):
    with edited(gpu, "bar.sync", "bar.warp.sync"):
        sum_kernel[(1,)](torch.arange(512.0), torch.empty(1), BLOCK=512)


@case
def shared_memory_out_of_bounds(gpu):
    with edited(gpu, "global_smem;", "global_smem+4096;"):
        sum_kernel[(1,)](torch.arange(512.0), torch.empty(1), BLOCK=512)


@triton.jit
def in_place_kernel(x, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at) * 2)


@case
def in_place_with_spare_warps():
    for block in (1, 16, 64):
        x = torch.ones(4 * block)
        in_place_kernel[(4,)](x, BLOCK=block, num_warps=4)
        assert x.tolist() == [2] * 4 * block


@triton.jit
def increment_kernel(x):
    tl.store(x, tl.load(x) + 1)  # FAULT: race_of_spare_warps_and_programs


@case
def race_of_spare_warps_and_programs():
    increment_kernel[(4,)](torch.zeros(1))


@triton.jit
def wrap_kernel(out, MODULUS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at % MODULUS, at)  # FAULT: race_between_parts_of_a_store


@case
def race_between_parts_of_a_store():
    wrap_kernel[(1,)](torch.empty(128, dtype=torch.int32), MODULUS=128, BLOCK=256, num_warps=1)


@triton.jit
def overlap_kernel(out, steps, BLOCK: tl.constexpr):
    for step in range(steps):
        tl.store(out + (steps - 1 - step) * 32 + tl.arange(0, BLOCK), step)


@case
def overlapping_stores_in_a_loop():
    overlap_kernel[(1,)](torch.empty(192, dtype=torch.int32), 5, BLOCK=64, num_warps=1)


@triton.jit
def scoped_kernel(counter, SCOPE: tl.constexpr):
    tl.atomic_add(counter, 1, sem="relaxed", scope=SCOPE)  # FAULT: atomic_within_a_program


@case
def atomic_within_a_program():
    scoped_kernel[(4,)](torch.zeros(1, dtype=torch.int32), SCOPE="cta")


@case
def atomic_for_all():
    scoped_kernel[(4,)](torch.zeros(1, dtype=torch.int32), SCOPE="gpu")


@case
def uninitialised_bools():
    copy_kernel[(1,)](torch.empty(100, dtype=torch.bool), torch.empty(100), 100, BLOCK=128)


@case
def filled_past_torch():
    for dtype, value in ((torch.uint8, 255), (torch.int32, -1), (torch.int64, -1), (torch.bool, 1), (torch.int8, 127)):
        for x in (torch.empty(N, dtype=dtype), torch.empty(N, dtype=dtype)[1:]):
            x.numpy()[:] = value
            copy_kernel[(8,)](x, torch.empty(N), len(x), BLOCK=128)
            x.data.fill_(value)
    torch.empty(0)


@triton.jit
def sine_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.sin(tl.load(x + at)))


@case
def sines_with_local_memory():
    x, out = torch.randn(256) * 10.0 ** torch.arange(256).remainder(30), torch.empty(256)
    sine_kernel[(1,)](x, out, BLOCK=256)
    torch.testing.assert_close(out, x.double().sin().float(), rtol=1e-5, atol=1e-6)


@triton.jit
def ticket_kernel(counter, out):
    tl.store(out + tl.program_id(0), tl.atomic_add(counter, 1))


@case
def order_of_programs():
    ticket_kernel[(4,)](torch.zeros(1, dtype=torch.int32), torch.empty(4, dtype=torch.int32))


@triton.jit
def count_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + tl.load(x + at) % 8, 1)


@case
def atomic_sums():
    x, out = torch.arange(512, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    count_kernel[(4,)](x, out, BLOCK=128)
    assert out.tolist() == [64] * 8


@triton.jit
def product_kernel(a, b, out, SIDE: tl.constexpr):
    row, column = tl.arange(0, SIDE)[:, None] * SIDE, tl.arange(0, SIDE)[None, :]
    product = tl.dot(tl.load(a + row + column), tl.load(b + row + column))  # FAULT: unsupported
    tl.store(out + row + column, product)


@case
def unsupported():
    a = torch.randn(64, 64, dtype=torch.float16)
    product_kernel[(1,)](a, a, torch.empty(64, 64), SIDE=64)


@triton.autotune([triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 256})], key=["n"])
@triton.jit
def tuned_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@case
def autotuned():
    tuned_kernel[(8,)](torch.randn(N), torch.empty(N), N)


def line_of(fault: str) -> int | None:
    """Return the line that a fault was planted in."""
    with open(__file__, encoding="utf-8") as stream:
        return next((number for number, line in enumerate(stream, 1) if line.endswith(f"# FAULT: {fault}\n")), None)


def run(name: str) -> dict[str, object]:
    """Run one case; return its findings, or the error that refused it."""
    gpu = virtual_gpu(seed=1)
    function = CASES[name]
    result: dict[str, object] = {"refused": "", "raised": False, "line": line_of(name)}
    try:
        with gpu:
            function(gpu) if function.__code__.co_argcount else function()
    except UnsupportedInstruction as error:
        result["refused"] = str(error)
    except KernelFaults as error:
        result["raised"] = error.findings == gpu.findings
    result["findings"] = [
        {
            "kind": finding.kind,
            "kernel": finding.kernel,
            "file": finding.file,
            "line": finding.line,
            "argument": finding.argument,
            "offset": finding.offset,
            "program": finding.program,
            "thread": finding.thread,
            "text": str(finding),
        }
        for finding in gpu.findings
    ]
    return result


if __name__ == "__main__":
    print(json.dumps({name: run(name) for name in sys.argv[1:] or CASES}))
