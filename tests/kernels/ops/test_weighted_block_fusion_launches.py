"""How weighted block fusion is cut into launches, programs and chunks, and what memory it takes and reaches."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from block_fusion_arguments import BACKENDS, check, interpreted, random_arguments

from trifuse.kernels import backend, weighted_block_fusion
from trifuse.kernels.testing import peak_memory_bytes

operator_module = import_module("trifuse.kernels.ops.weighted_block_fusion")


@pytest.mark.parametrize("name", BACKENDS)
def test_results_repeat_bit_for_bit(name):
    def run():
        maps, logits = random_arguments(26, 3, 41, 48, maps_grad=False)
        with backend(name):
            fused = weighted_block_fusion(maps, logits)
        fused.backward(torch.randn(fused.shape, generator=torch.Generator().manual_seed(3)))
        return fused, logits.grad

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@interpreted
def test_backward_adds_up_many_tiles_in_few_programs(monkeypatch):
    gpu = import_module("trifuse.kernels.gpu.weighted_block_fusion")
    monkeypatch.setattr(gpu, "MAX_PROGRAMS", 3)
    check("triton", *random_arguments(3, 3, 11, 160, dtype=torch.bfloat16))
    monkeypatch.setattr(gpu, "REDUCE_ELEMENTS", 4)
    check("triton", *random_arguments(3, 3, 11, 160))


def test_maps_are_cut_into_even_launches():
    gpu = import_module("trifuse.kernels.gpu.weighted_block_fusion")
    assert gpu.launch_groups(1) == [(0, 1)]
    assert gpu.launch_groups(24) == [(0, 24)]
    assert gpu.launch_groups(40) == [(0, 20), (20, 40)]
    assert gpu.launch_groups(64) == [(0, 21), (21, 42), (42, 64)]


def test_chunked_path_over_several_chunks(monkeypatch):
    monkeypatch.setattr(operator_module, "CHUNK_ELEMENTS", 16)
    for dtype in (torch.float32, torch.bfloat16):
        check("torch", *random_arguments(3, 2, 5, 7, dtype=dtype))
        maps, logits = random_arguments(3, 2, 6, 7, dtype=dtype, maps_grad=False)
        check("torch", [feature[:, 1:].requires_grad_() for feature in maps], logits)


@pytest.mark.parametrize("name", BACKENDS)
def test_low_precision_terms_are_not_rounded_before_they_are_added(name):
    """A third has no exact bfloat16, so terms rounded on their own do not cancel."""
    maps = [torch.full((1, 1, 1), value, dtype=torch.bfloat16) for value in (1.0, -1.0, 0.0)]
    with backend(name):
        assert weighted_block_fusion(maps, torch.zeros(3)).item() == 0


def test_peak_extra_memory_is_one_map():
    """And a chunk of it, which in maps as large as these is a sixth."""
    maps, logits = random_arguments(12, 1, 1025, 1536, maps_grad=False)
    map_bytes = maps[0].numel() * maps[0].element_size()
    grad = torch.ones_like(maps[0])
    for n in (2, 12):
        some = logits[:n].detach().requires_grad_()
        assert peak_memory_bytes(lambda n=n, some=some: weighted_block_fusion(maps[:n], some)) <= 1.2 * map_bytes
        both = lambda n=n, some=some: weighted_block_fusion(maps[:n], some).backward(grad)  # noqa: E731
        assert peak_memory_bytes(both) <= 1.2 * map_bytes
