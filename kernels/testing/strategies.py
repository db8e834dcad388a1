"""A hypothesis strategy for tensors of any shape, type and memory layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor


def tensors(
    shape: SearchStrategy[Sequence[int]] | Sequence[int],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    requires_grad: bool | None = None,
    strided: bool = True,
    expanded: bool = False,
    device: str = "cpu",
) -> SearchStrategy[Tensor]:
    """Draw tensors of normal random values; they shrink to contiguous ones that need no gradient.

    Args:
        shape: one shape, or a strategy of shapes, e.g. ``st.tuples(st.integers(0, 4), st.just(8))``.
        dtypes: types to draw from; float32 if not given.
        requires_grad: None draws it, for types that can have a gradient.
        strided: draw permuted dimensions, steps between elements, and a storage offset as well.
        expanded: draw dimensions of stride zero as well, as `torch.Tensor.expand` makes them.
        device: where the tensors lie.
    """
    shapes = shape if isinstance(shape, st.SearchStrategy) else st.just(tuple(shape))

    @st.composite
    def draw_tensor(draw: Callable[[Any], Any]) -> Tensor:
        size = tuple(draw(shapes))
        dtype = draw(st.sampled_from(dtypes or (torch.float32,)))
        generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**16)))
        order, steps, offset = tuple(range(len(size))), (1,) * len(size), 0
        if strided:
            order = tuple(draw(st.permutations(order)))
            steps = tuple(draw(st.tuples(*(st.integers(1, 2) for _ in size))))
            offset = draw(st.integers(0, 5))
        repeated = tuple(draw(st.tuples(*(st.booleans() if expanded else st.just(False) for _ in size))))
        held = [1 if repeat and length else length for repeat, length in zip(repeated, size, strict=True)]
        stored = [held[dim] * steps[dim] for dim in order]
        count = 1
        for length in stored:
            count *= length
        storage = torch.randn(offset + count, generator=generator, device=device).to(dtype)
        values = storage[offset:].view(stored).permute([order.index(dim) for dim in range(len(size))])
        for dim, step in enumerate(steps):
            values = values[(slice(None),) * dim + (slice(None, None, step),)]
        differentiable = dtype.is_floating_point or dtype.is_complex
        needs_grad = (differentiable and draw(st.booleans())) if requires_grad is None else requires_grad
        return values.expand(size).requires_grad_(needs_grad)

    return draw_tensor()
