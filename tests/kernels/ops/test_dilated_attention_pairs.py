"""Dilated attention in bfloat16, whose kernels take pairs of pixels: every height, each border, every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from trifuse.kernels import backend, dilated_attention, dilated_attention_reference
from trifuse.kernels.library import launched
from trifuse.kernels.testing import assert_op_matches, poisoned_empty

gpu = pytest.importorskip("trifuse.kernels.gpu.dilated_attention", reason="the kernels are triton's")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
PAIRS, SINGLES = "_dilated_attention_dq_pairs_kernel", "_dilated_attention_dq_kernel"
DKDV = "_dilated_attention_dkdv_pairs_kernel"
CUT_OFF = 4 * torch.finfo(torch.bfloat16).eps  # the interpreter cuts off what a GPU rounds when it is stored


def bfloat16_maps(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3)]


def check(*maps: torch.Tensor, kernel: str = PAIRS, **options) -> None:
    """Compare values and gradients with the reference, unwritten memory being NaN, and see that a kernel ran."""
    before = launched[kernel]
    with backend("triton"), poisoned_empty():
        assert_op_matches(dilated_attention, dilated_attention_reference, *maps, atol=CUT_OFF, **options)
    assert launched[kernel] > before


@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize("height", [1, 2, 3, 5, 6, 7])
def test_every_height_is_cut_into_pairs_and_single_rows(height, dilation):
    """Heights below the dilation, within a band of two dilations, on its edge, and one row beyond it."""
    check(*bfloat16_maps(1, height, 4, 8), num_heads=1, dilations=(dilation,))


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("shape", [(2, 7, 5, 48), (1, 9, 1, 72), (1, 5, 11, 24)], ids=str)
def test_dilations_that_need_different_numbers_of_pairs(shape, border):
    check(*bfloat16_maps(*shape), num_heads=3, dilations=(1, 2, 4), border=border)


@given(
    height=st.integers(1, 9), width=st.integers(1, 6), dilations=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    border=st.sampled_from(["zero", "mask"]), chunks=st.integers(1, 3), scale=st.sampled_from([None, 0.0, -0.7]),
)  # fmt: skip
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])  # interpreted, shrinking would take minutes
def test_property_of_pairs(height, width, dilations, border, chunks, scale):
    maps = bfloat16_maps(1, height, width, 8 * chunks * len(dilations))
    check(*maps, num_heads=len(dilations), dilations=tuple(dilations), border=border, scale=scale)


def test_a_map_of_several_tiles_for_both_numbers_of_threads():
    maps = bfloat16_maps(1, 21, 20, 24)
    for choice in gpu.CHOICES:
        with gpu.tuning.forced(gpu.forward, choice), gpu.tuning.forced(gpu.backward, choice):
            check(*maps, num_heads=3, dilations=(1, 2, 3))


def test_slices_of_one_projection_have_another_layout_than_the_result():
    packed = bfloat16_maps(1, 5, 4, 3 * 24)[0].detach()
    check(*(part.requires_grad_() for part in packed.chunk(3, dim=-1)), num_heads=1, dilations=(2,))
    q, k, v = bfloat16_maps(1, 5, 4, 24)
    columns_outside = k.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    check(q, columns_outside, v, num_heads=1, dilations=(2,))


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_k21_extreme_logits_do_not_overflow(border):
    """Where all logits are far below zero, a key outside of the image would outweigh them without limit."""
    q, _, v = bfloat16_maps(1, 5, 3, 8)
    q = (q.detach().abs() * 100).requires_grad_()
    check(q, (-q).detach(), v, num_heads=1, dilations=(1,), border=border)


@pytest.mark.parametrize("trained", ["q", "k", "v", "kv"])
def test_k22_only_the_gradients_asked_for(trained):
    maps = bfloat16_maps(1, 5, 3, 8)
    for x, letter in zip(maps, "qkv", strict=True):
        x.requires_grad_(letter in trained)
    before = launched[DKDV]
    check(*maps, num_heads=1, dilations=(2,))
    assert (launched[DKDV] > before) == (trained != "q")


@pytest.mark.parametrize("exponent", [-60, 60])
def test_gradients_of_any_size_have_the_same_digits(exponent):
    """What the first kernel writes for the second one is of 16 bits, whatever the size of the incoming gradient."""
    maps, grad = bfloat16_maps(1, 5, 4, 24), bfloat16_maps(1, 5, 4, 24, seed=1)[0].detach()
    with backend("triton"):
        out = dilated_attention(*maps, num_heads=1, dilations=(1,))
    found = torch.autograd.grad(out, maps, grad * 2.0**exponent, retain_graph=True)
    for mine, truth in zip(found, torch.autograd.grad(out, maps, grad), strict=True):
        assert truth.abs().max() > 0.1
        assert torch.equal(mine * 2.0**-exponent, truth)


def test_two_runs_give_the_same_bits():
    maps = bfloat16_maps(1, 7, 5, 48)
    results = []
    for _ in range(2):
        with backend("triton"):
            out = dilated_attention(*maps, num_heads=2, dilations=(1, 3))
            results.append([out, *torch.autograd.grad(out, maps, torch.ones_like(out))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("place", [(0, 0, 3), (0, 2, 0), (0, 4, 1)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_k19_what_is_not_finite_reaches_its_windows_alone(place, value):
    for which in range(3):
        maps = [x.detach() for x in bfloat16_maps(1, 5, 4, 8)]
        maps[which][place] = value
        with backend("triton"):
            out = dilated_attention(*maps, num_heads=1, dilations=(2,))
        truth = dilated_attention_reference(*maps, num_heads=1, dilations=(2,))
        assert torch.equal(out.isnan(), truth.isnan()), which
        assert torch.equal(out.isinf(), truth.isinf()), which


def test_maps_whose_words_would_be_cut_in_two_and_shifted_windows_take_single_pixels():
    before = launched[PAIRS]
    sources = [torch.randn(1 + 2 * 3 * 8).bfloat16() for _ in range(3)]
    odd = [x[1:].view(1, 2, 3, 8).requires_grad_() for x in sources]
    check(*odd, kernel=SINGLES, num_heads=1, dilations=(1,))
    check(*bfloat16_maps(1, 3, 4, 8), kernel=SINGLES, num_heads=1, dilations=(1,), border="shift")
    check(*bfloat16_maps(1, 3, 4, 32), kernel=SINGLES, num_heads=1, dilations=(1,))
    check(*bfloat16_maps(1, 3, 4, 12), kernel=SINGLES, num_heads=1, dilations=(1,))
    assert launched[PAIRS] == before
