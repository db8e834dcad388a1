"""Blocks that a virtual GPU refuses, or that must leave nothing behind; run as a program, it prints what came of each.

Runs in a process of its own, without TRITON_INTERPRET, as an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import torch
import triton
import triton.backends.nvidia.compiler
import triton.language as tl
from torch._subclasses import FakeTensorMode

from trifuse.kernels import library, upsample_argmax
from trifuse.kernels.testing import virtual_gpu

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


def copy(grid=(1,), n=100, x=None):
    copy_kernel[grid](torch.ones(100) if x is None else x, torch.empty(100), n, BLOCK=128)


@case
def without_a_launch():
    with virtual_gpu():
        torch.ones(3).sum()


@case
def without_a_launch_but_expected():
    with virtual_gpu() as gpu:
        gpu.expects_launches = False


@case
def launches_of_an_inner_block():
    with virtual_gpu():
        with virtual_gpu() as inner:
            copy()
        assert len(inner.launches) == 1


@case
def operator_without_a_kernel():
    with virtual_gpu():
        upsample_argmax([torch.randn(1, 2, 4, 4, dtype=torch.float64)], (8, 8))


@case
def build_that_fails():
    backend = triton.backends.nvidia.compiler.CUDABackend
    make_cubin = backend.make_cubin

    def fail(*given, **settings):
        raise RuntimeError("the assembler fails")

    backend.make_cubin = fail
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    try:
        with virtual_gpu():
            upsample_argmax([torch.randn(1, 3, 5, 4)], (9, 9))
    finally:
        backend.make_cubin = make_cubin
        del os.environ["TRITON_ALWAYS_COMPILE"]
        left = library.fallbacks()
        with virtual_gpu() as gpu:
            upsample_argmax([torch.randn(1, 3, 5, 4)], (9, 9))
        assert left == {}
        assert len(gpu.launches) == 1


@triton.jit
def first_kernel(counter, out, x, SELECTED: tl.constexpr):
    ticket, program = tl.atomic_add(counter, 1), tl.program_id(0)
    value = tl.load(x + tl.where((ticket == 0) & (program == SELECTED), 1000, 0))
    tl.store(out + program, value)


@case
def faults_in_either_order():
    """An access out of bounds by whichever program comes first: each of two orders has one."""
    found = []
    for selected in range(4):
        with virtual_gpu(seed=3) as gpu:
            first_kernel[(4,)](torch.zeros(1, dtype=torch.int32), torch.ones(4), torch.ones(1), selected)
            found += [finding.kind for finding in gpu.findings]
            gpu.findings.clear()
    assert found == ["out of bounds"] * 2, found


@case
def a_second_thread():
    errors = []

    def block():
        try:
            with virtual_gpu():
                copy()
        except Exception as error:
            errors.append(error)

    def in_a_thread():
        thread = threading.Thread(target=block)
        thread.start()
        thread.join()

    with virtual_gpu():
        in_a_thread()
        copy()
    in_a_thread()  # once the first is through, there is nothing in the way
    (error,) = errors
    raise error


@case
def the_same_object_within_itself():
    gpu = virtual_gpu()
    with gpu, gpu:
        copy()


@case
def decorator():
    virtual_gpu(copy)


@case
def decorator_with_settings():
    virtual_gpu(seed=1)(copy)


@case
def forgotten_parentheses():
    with virtual_gpu:
        copy()


@case
def orders_of_a_float():
    virtual_gpu(orders=1.5)


for name, grid in {"y": (1, 70_000), "z": (1, 1, 70_000), "x": (2**31,), "negative": (-1,), "many": (2**30,)}.items():

    def launch(grid=grid):
        with virtual_gpu():
            copy(grid, n=0)

    CASES[f"grid_{name}"] = launch


@case
def grid_of_nothing():
    with virtual_gpu() as gpu:
        copy((0,))
        assert [launch.grid for launch in gpu.launches] == [(0, 1, 1)]


@case
def fake_tensor():
    with FakeTensorMode():
        fake = torch.empty(100)
    with virtual_gpu():
        copy(x=fake)


@case
def resized_storage():
    with virtual_gpu():
        x = torch.empty(10)
        x.untyped_storage().resize_(400)
        copy(x=x.as_strided((100,), (1,)))


@triton.jit
def endless_kernel(x, out):
    value = tl.load(x)
    while value < 1:
        value = tl.load(x)
    tl.store(out, value)


@case
def endless():
    with virtual_gpu(most_instructions=100_000):
        endless_kernel[(1,)](torch.zeros(1), torch.empty(1))


@case
def interrupted():
    import _thread
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored in the background
    threading.Timer(0.5, _thread.interrupt_main).start()
    start = time.perf_counter()
    try:
        with virtual_gpu(most_instructions=1 << 40):
            endless_kernel[(1,)](torch.zeros(1), torch.empty(1))
    except KeyboardInterrupt:
        assert time.perf_counter() - start < 60
        raise RuntimeError("interrupted") from None


@triton.jit
def print_kernel(x):
    tl.device_print("x", tl.load(x))


@case
def device_print():
    with virtual_gpu():
        print_kernel[(1,)](torch.ones(1))


@triton.jit
def assert_kernel(x):
    tl.device_assert(tl.load(x) > 0, "x")


@case
def device_assert():
    with virtual_gpu():
        assert_kernel[(1,)](torch.ones(1), debug=True)


@triton.jit(noinline=True)
def twice(x):
    return x * 2


@triton.jit
def call_kernel(x, out):
    tl.store(out, twice(tl.load(x)))


@case
def noinline():
    with virtual_gpu():
        call_kernel[(1,)](torch.ones(1), torch.ones(1))


def outcome(function) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


if __name__ == "__main__":
    print(json.dumps({name: outcome(CASES[name]) for name in sys.argv[1:] or CASES}))
