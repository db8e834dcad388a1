"""Time and memory of known computations."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from trifuse.kernels.testing import Timing, measure, peak_memory_bytes, saved_for_backward_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: torch.empty(MIB, dtype=torch.int8), MIB),
        (lambda: [torch.zeros(MIB, dtype=torch.int8) for _ in range(3)], 3 * MIB),
        (lambda: [torch.zeros(MIB // 4).sum() for _ in range(3)], MIB),
        (lambda: (torch.ones(MIB, dtype=torch.int8) + 1) * 2, 2 * MIB),
        (lambda: None, 0),
    ],
    ids=["one", "three held", "three in turn", "chain", "nothing"],
)
def test_peak_memory_of_known_cases(function, expected):
    assert expected <= peak_memory_bytes(function) < expected + 4096


def test_peak_memory_sees_what_is_saved_for_backward():
    x = torch.zeros(MIB // 4, requires_grad=True)

    def step():
        y = x
        for _ in range(10):
            y = y.exp()
        return torch.autograd.grad(y.sum(), x)

    assert 10 * MIB <= peak_memory_bytes(step) < 12 * MIB + 4096


def test_measure_tells_fast_from_slow():
    x = torch.ones(64, 64)

    def once():
        return x @ x

    def four_times():
        return [x @ x for _ in range(4)]

    timings = measure({"slow": four_times, "fast": once}, seconds=0.2)
    assert 2 < timings["fast"].speedup_over(timings["slow"]) < 8
    low, high = timings["slow"].quintiles
    assert 0 < low <= timings["slow"].median <= high
    assert timings["slow"].peak_bytes == 4 * timings["fast"].peak_bytes == 4 * 64 * 64 * 4


def test_speedup_is_paired():
    """A machine that turns ten times slower halfway leaves the ratio of each round as it was."""
    fast, slow = Timing((1.0, 1.0, 10.0, 10.0), 0), Timing((2.0, 2.0, 20.0, 20.0), 0)
    assert fast.speedup_over(slow) == 2.0


# --------------------------------------------------------------------------------------- saved for the backward pass

FLOATS = 1000
BYTES = 4 * FLOATS


class Hidden(torch.autograd.Function):
    """Saves its result by the official way, and a copy of it behind autograd's back."""

    @staticmethod
    def forward(ctx, x):
        result = x + 1
        ctx.save_for_backward(result)
        ctx.copy = result.clone()
        return result

    @staticmethod
    def backward(ctx, grad):
        return grad


def used_twice(x, y):
    z = x.exp()
    return z * z.view(10, -1).view(-1)


def partly_thrown_away(x, y):
    x.exp().sin()
    return y.exp() + y


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: x + y, 0),
        (lambda x, y: x * y, 0),
        (lambda x, y: x.exp() + y, BYTES),
        (lambda x, y: x.exp().exp().exp(), 3 * BYTES),
        (lambda x, y: [x.exp(), (x * 2, y.exp())[1]], 2 * BYTES),
        (lambda x, y: Hidden.apply(x), BYTES),
        (lambda x, y: x.detach().exp() * y, BYTES),
        (used_twice, BYTES),
        (partly_thrown_away, BYTES),
        (lambda x, y: x.detach() + 1, 0),
    ],
    ids=["sum", "arguments", "result", "chain", "list", "own function", "detached", "twice", "thrown away", "nothing"],
)
def test_saved_bytes_of_known_cases(function, expected):
    x, y = (torch.ones(FLOATS, requires_grad=True) for _ in range(2))
    assert saved_for_backward_bytes(function, x, y) == expected


def test_counting_saved_bytes_leaves_none_behind():
    x = torch.ones(FLOATS, requires_grad=True)
    kept = []
    saved_for_backward_bytes(lambda x: kept.append(weakref.ref((x * 2).exp_())) or kept[-1](), x)
    assert kept[0]() is None


def test_parameters_and_nested_arguments_are_not_saved_bytes():
    layer = nn.Linear(10, 20)
    x = torch.ones(7, 10, requires_grad=True)
    assert saved_for_backward_bytes(lambda pair: layer(pair[0]), [x]) == 0
    assert saved_for_backward_bytes(lambda pair: layer(pair[0]).exp(), (x,)) == 7 * 20 * 4
