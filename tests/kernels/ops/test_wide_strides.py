"""K17: every argument and incoming gradient of every operator may lie far apart along every one of its axes.

A forked child lays all tensors of a call into a sparse file, far apart along one axis at a time. Products of an index
and a stride in 32 bits leave the file, and end the child, or read another place. Strides beyond 2^31 are 64 bits wide
by themselves, so another stride fits into 32 bits, but its double does not. The interpreter multiplies in the types
that compiled kernels multiply in, and wraps as they do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from children import Child
from operator_calls import OF_TWO_LAYOUTS, OPERATORS, Call, calls_of
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from trifuse import kernels
from trifuse.kernels import backend

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
FILE_BYTES = 1 << 39  # none of them in memory until they are written
SHAPES = ((3, 4, 1, 1), (1, 4, 3, 1), (1, 4, 1, 3))  # four channels are 16 bytes, which kernels load at once
FAR = (5 << 28, 5 << 29)  # a stride of 32 bits whose double has more, and one that has more itself


@contextmanager
def sparse_memory() -> Iterator[Tensor]:
    """Give the bytes of a sparse file in memory: one on a disk takes milliseconds for each place that is written."""
    with open(os.memfd_create("sparse"), "rb+") as file:
        file.truncate(FILE_BYTES)
        yield torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=FILE_BYTES, dtype=torch.uint8)


def wide(tensor: Tensor, axis: int, stride: int, memory: Tensor) -> Tensor:
    """Copy a tensor into the memory, ``stride`` elements apart along one axis, and laid out as it is along others."""
    strides = [stride if i == axis else step for i, step in enumerate(tensor.stride())]
    copy = memory.view(tensor.dtype).as_strided(tensor.shape, strides)
    with torch.no_grad():
        copy.copy_(tensor)
    return copy.requires_grad_(tensor.requires_grad)


def long_along(axis: int, call: Call, grad: Tensor | None) -> tuple[int, ...]:
    """Return which tensors of a call, its incoming gradient included, have several elements along an axis."""
    leaves, _ = tree_flatten((call.arguments, call.options, grad))
    return tuple(
        i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] > 1
    )


def far_apart(call: Call, grad: Tensor | None, axis: int, stride: int, memory: Tensor) -> Any:
    """Return a call and its incoming gradient, the tensors that are long along an axis far apart along it."""
    leaves, spec = tree_flatten((call.arguments, call.options, grad))
    for i in long_along(axis, call, grad):  # side by side: each is far smaller than the memory between two of its rows
        leaves[i] = wide(leaves[i], axis, stride, memory[i << 20 :])
    arguments, options, grad = tree_unflatten(leaves, spec)
    return Call(call.function, arguments, options), grad


def results(call: Call, grad: Tensor | None, name: str) -> list[Tensor]:
    """Return the result of a call and its gradients."""
    with backend(name):
        result = call()
        if not call.leaves():
            return [result]
        return [result.detach(), *torch.autograd.grad(result, call.leaves(), grad)]


def check(op: str) -> None:
    """Compare what an operator's kernels make of tensors that lie far apart with what plain PyTorch makes of them."""
    with sparse_memory() as memory:
        layouts = (False, True) if op in OF_TWO_LAYOUTS else (False,)
        seen: set[Any] = set()
        for shape, channels_last, axis, stride in itertools.product(SHAPES, layouts, range(4), FAR):
            for number, call in enumerate(calls_of(op, shape, channels_last=channels_last)):
                grad = torch.randn_like(call().detach()) if call.leaves() else None
                long = long_along(axis, call, grad)
                case = (number, channels_last, axis, stride, long)
                if not long or case in seen:  # the same tensors were far apart in another shape
                    continue
                seen.add(case)
                moved = far_apart(call, grad, axis, stride, memory)
                print(f"call {number} of {shape}, axis {axis}, stride {stride}, {channels_last=}", flush=True)
                found, truth = results(*moved, "triton"), results(call, grad, "torch")
                torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)


@interpreted
@pytest.mark.parametrize("op", OPERATORS)
def test_k17_every_argument_far_apart_along_every_axis(op, low_tiles):
    assert Child(lambda: check(op)).wait(280) == 0


def check_pairs() -> None:
    """Compare dilated attention in bfloat16, whose kernels take pairs of pixels, along every axis but the channels'."""
    with sparse_memory() as memory:
        for axis, stride in itertools.product(range(3), FAR):
            maps = [torch.randn(2, 4, 3, 8).bfloat16().requires_grad_() for _ in range(3)]
            call = Call(kernels.dilated_attention, tuple(maps), {"num_heads": 1, "dilations": (1,)})
            grad = torch.randn(2, 4, 3, 8).bfloat16()
            moved = far_apart(call, grad, axis, stride, memory)
            found, truth = results(*moved, "triton"), results(call, grad, "torch")
            eps = 4 * torch.finfo(torch.bfloat16).eps  # the interpreter cuts off what a GPU rounds
            torch.testing.assert_close(found, truth, atol=eps, rtol=eps)


@interpreted
def test_k17_pairs_of_pixels_far_apart():
    assert Child(check_pairs).wait(280) == 0


@interpreted
def test_k17_cells_of_a_coarse_gradient_are_numbered_in_64_bits(monkeypatch):
    """One program far into the last kernel of a coarse map's gradient, of maps of one row, a cell for each pixel."""
    sums = pytest.importorskip("trifuse.kernels.gpu.segmentation_sums_backward")
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    cell = 1 << 32  # which is 0 in 32 bits
    across = sums.FOLDED_COLUMNS
    block = cell // across
    number = builder.create_get_program_id

    def far_program(axis):
        handle = number(axis)
        handle.data = handle.data + (block // sums.FOLDED_BLOCKS if axis == 0 else 0)
        return handle

    monkeypatch.setattr(builder, "create_get_program_id", far_program)
    with sparse_memory() as bytes_of_memory:
        memory = bytes_of_memory.view(torch.float32)
        cells = cell + across
        partial, grad = memory[: 2 * cells].view(-1, 1, 2, 1, across), memory[4 * cell :][:cells].view(-1, across)
        partial[block, 0, 0] = 3.0
        sizes = ((2,), (1,), (across,), len(grad), 1, 1, across)  # slots, coarse height and width; samples, strips, ...
        constants = {"N": 1, "K": 1, "STEPS": 1, "BLOCKS": sums.FOLDED_BLOCKS, "COLUMNS": across, "SHARING": 1}
        sums.launching.launch(sums._fold_rows_kernel, (1,), (partial,), (grad,), *sizes, **constants)
        assert (grad[block] == 3.0).all()
