"""A forced backend holds for the thread or the task that forces it, under a compiler, and in its backward passes."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from operator_calls import OPERATORS, calls_of
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from trifuse.kernels import BackendError, backend, channel_gate
from trifuse.kernels.library import forced_backend


def in_a_thread(function: Callable[[], Any]) -> Any:
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(60)
    return results[0]


def test_k36_two_threads_that_enter_and_leave_in_turns_keep_their_own():
    turns = threading.Barrier(2, timeout=60)
    seen = {}

    def force(name: str, leaves_first: bool) -> None:
        with backend(name):
            turns.wait()  # both are inside
            if not leaves_first:
                turns.wait()  # the other has left
            seen[name] = forced_backend()
        if leaves_first:
            turns.wait()
        seen[f"{name}, left"] = forced_backend()

    threads = [threading.Thread(target=force, args=each) for each in (("reference", True), ("torch", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {"reference": "reference", "torch": "torch", "reference, left": None, "torch, left": None}
    with backend("reference"):
        assert in_a_thread(forced_backend) is None


def test_k36_two_tasks_of_one_thread_keep_their_own():
    async def force(name: str) -> str | None:
        with backend(name):
            await asyncio.sleep(0)
            return forced_backend()

    async def both() -> list[str | None]:
        return await asyncio.gather(force("reference"), force("torch"))

    assert asyncio.run(both()) == ["reference", "torch"]
    assert forced_backend() is None
    assert seen_in_backward() is None


def test_blocks_within_blocks():
    with backend("torch"):
        with backend("triton", strict=False):
            assert forced_backend() == "triton"
            assert forced_backend("memory_efficient_attention") is None
        assert forced_backend() == "torch"
        with pytest.raises(BackendError), backend("triton"):
            channel_gate(torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1))
        assert forced_backend() == "torch"
    assert forced_backend() is None


NUMBERS = {None: 1.0, "torch": 2.0, "reference": 3.0}


def numbered(x):
    return x * NUMBERS[forced_backend()]


def test_k36_compiled_code_compiles_anew_for_another_backend_and_sees_its_own_thread_s():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(numbered, fullgraph=True, backend=counter)
    x = torch.ones(())
    for _ in range(2):
        assert compiled(x) == 1
        with backend("torch"):
            assert compiled(x) == 2
            assert in_a_thread(lambda: compiled(x)) == 1
        with backend("reference"):
            assert compiled(x) == 3
    assert counter.frame_count == 3


def test_compiled_code_may_force_a_backend_itself():
    torch._dynamo.reset()

    def function(x):
        with backend("reference"):
            y = numbered(x)
        return y + 10 * numbered(x)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.ones(())) == 13
    assert forced_backend() is None
    with backend("torch"):
        assert compiled(torch.ones(())) == function(torch.ones(())) == 23


def seen_in_backward() -> str | None:
    """What a backward pass sees that runs in a thread where no context variable was ever set, as on a GPU."""
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(contextvars.Context().run(forced_backend)))
    x.sum().backward()
    return seen[0]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="threads of a backward pass have no context there")
def test_k36_a_backward_pass_in_another_thread_sees_what_its_caller_forces():
    with backend("reference"):
        assert seen_in_backward() == "reference"
        with backend("torch"):
            assert seen_in_backward() == "torch"
        assert seen_in_backward() == "reference"
        assert in_a_thread(seen_in_backward) is None
    assert seen_in_backward() is None


def test_what_is_repeated_for_backward_inside_the_block_sees_the_same():
    seen = []

    def function(x):
        seen.append(forced_backend())
        return x.exp()

    x = torch.ones(1, requires_grad=True)
    with backend("reference"):
        checkpoint(function, x, use_reentrant=False).backward()
    assert seen == ["reference", "reference"]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("name", ["torch", "reference"])
def test_backward_is_decided_in_forward(op, name):
    """Whatever is forced when and where it runs, the gradient is that of the path that ran."""
    call = calls_of(op, (2, 4, 3, 5))[0]
    if not call.leaves():
        return  # argmax has no gradient

    def gradients(other: str | None) -> list[torch.Tensor]:
        with backend(name):
            result = call().square().sum()

        def differentiate() -> list[torch.Tensor]:
            with nullcontext() if other is None else backend(other):
                return list(torch.autograd.grad(result, call.leaves()))

        return in_a_thread(differentiate)  # always: threads may add up in parts of their own

    expected = gradients(None)
    for other in ("torch", "reference", "triton"):
        assert all(map(torch.equal, gradients(other), expected)), other
