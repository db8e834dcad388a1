"""Sums over channels by way of a batch normalisation's backward pass: values, layouts, types, and no product map."""

from __future__ import annotations

import pytest
import torch

from trifuse.kernels.cpu import channel_sums as channel_sums_file
from trifuse.kernels.cpu.channel_sums import channel_sums
from trifuse.kernels.ops.gates import _products_summed
from trifuse.kernels.testing.measuring import peak_memory_bytes

LAYOUTS = {
    "planes": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns of a wider map": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "one map for all samples": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sums_of_any_layout_and_type(dtype, of_x, of_grad, monkeypatch):
    monkeypatch.setattr(channel_sums_file, "FEWEST_ELEMENTS", 1)
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(3, 5, 4, 7, generator=generator).to(dtype) for _ in range(2))
    grad, x = LAYOUTS[of_grad](grad), LAYOUTS[of_x](x)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    dots, totals = channel_sums(grad, x, compute_dtype)
    assert dots.dtype == totals.dtype == compute_dtype
    expected = (grad.double() * x.double()).sum((2, 3)), grad.double().sum((2, 3))
    torch.testing.assert_close((dots.double(), totals.double()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_no_product_map_is_made(layout):
    grad, x = (LAYOUTS[layout](torch.randn(2, 16, 64, 64)) for _ in range(2))
    assert peak_memory_bytes(lambda: channel_sums(grad, x, torch.float32)) < x.nbytes / 16


def test_products_of_a_gate_of_positions_are_made_sample_by_sample(monkeypatch):
    monkeypatch.setattr("trifuse.kernels.ops.gates.CHUNK_ELEMENTS", 2 * 5 * 4 * 7)
    grad, x = torch.randn(2, 3, 5, 4, 7, generator=torch.Generator().manual_seed(0))
    sums = _products_summed(grad, x, torch.Size((3, 1, 4, 7)), torch.float32)
    torch.testing.assert_close(sums, (grad * x).sum(1, keepdim=True))
