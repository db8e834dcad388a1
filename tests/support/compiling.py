"""Hold compiled code against the same code run eagerly: values, every gradient, buffers, and how often it compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves, tree_map_only

Call = Callable[[nn.Module, Any], Any]


def assert_compiles(
    model: nn.Module,
    call: Call,
    inputs: Iterable[Any],
    *,
    graphs: int,
    backend: str = "aot_eager",
    dynamic_batch: bool = False,
) -> None:
    """Hold ``call(model, input)``, compiled as a whole, against itself.

    Args:
        model: a copy of it is what runs eagerly.
        call: may return tensors in any nesting.
        inputs: one after the other, nested tensors; floating-point ones get a gradient, too.
        graphs: how often it may be compiled for all of them.
        backend: of `torch.compile`.
        dynamic_batch: declare the first axis of every input dynamic: code that is made for one length is an error.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    twin = copy.deepcopy(model)
    for given in inputs:
        expected, got = (_outcome(*form, given, dynamic_batch) for form in ((call, twin), (compiled, model)))
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert counter.frame_count <= graphs, f"compiled {counter.frame_count} times"


def _outcome(call: Call, model: nn.Module, given: Any, dynamic_batch: bool) -> dict[str, Tensor]:
    """Values, gradients and buffers by name, with the draws that one seed makes."""
    given = tree_map_only(Tensor, lambda x: x.clone().requires_grad_(x.is_floating_point()), given)
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    if dynamic_batch:
        for leaf in leaves:
            torch._dynamo.mark_dynamic(leaf, 0)
    model.zero_grad()
    torch.manual_seed(4)
    outputs = [leaf for leaf in tree_leaves(call(model, given)) if isinstance(leaf, Tensor)]
    sum(_weighed(output) for output in outputs if output.requires_grad).backward()
    named = {f"output {k}": output.detach() for k, output in enumerate(outputs)}
    named |= {f"gradient of input {k}": leaf.grad for k, leaf in enumerate(leaves) if leaf.grad is not None}
    named |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return named | {name: buffer.clone() for name, buffer in model.named_buffers()}


def _weighed(output: Tensor) -> Tensor:
    """A number that every element has its own weight in: a plain sum would hide what a normalisation takes away."""
    return (output * torch.linspace(-1, 2, output.numel()).to(output).view(output.shape)).sum()
