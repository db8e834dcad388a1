"""Drawn tensors have every layout, and gradients where they can."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from trifuse.kernels.testing import tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_tensors_draw_every_layout():
    seen = set()

    @settings(max_examples=200, derandomize=True)
    @given(tensors((3, 4), dtypes=DTYPES, expanded=True))
    def draw(x):
        assert x.shape == (3, 4)
        assert x.is_leaf
        seen.update(
            {
                "offset": x.storage_offset() > 0,
                "permuted": x.stride(0) < x.stride(1),
                "stepped": x.stride(1) == 2,
                "expanded": 0 in x.stride(),
                "contiguous": x.is_contiguous(),
                "needs gradient": x.requires_grad,
            }.items()
        )
        seen.add(x.dtype)

    draw()
    assert len(seen) == 12 + len(DTYPES)


@given(tensors((2, 3), dtypes=(torch.int64, torch.bool)))
def test_integers_are_drawn_without_gradients(x):
    assert not x.requires_grad


def test_plain_tensors_are_contiguous():
    @given(tensors((2, 3), strided=False, requires_grad=True))
    def check(x):
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        assert x.requires_grad

    check()
