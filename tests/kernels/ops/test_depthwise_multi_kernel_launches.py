"""How the depthwise multi-kernel convolution is cut into launches and tiles, and which addresses it reaches."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from depthwise_arguments import BACKENDS, check, interpreted, random_arguments

from trifuse.kernels import backend, depthwise_multi_kernel
from trifuse.kernels.gpu import tuning
from trifuse.kernels.testing.counting import launches

pytestmark = pytest.mark.usefixtures("low_tiles")


@pytest.mark.parametrize("name", BACKENDS)
def test_results_repeat_bit_for_bit(name):
    def run():
        x, weights = random_arguments((2, 3, 5, 6), (1, 3))
        with backend(name):
            out = depthwise_multi_kernel(x, weights)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        return out, *torch.autograd.grad(out, [x, *weights], grad)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


FORWARD = "trifuse.kernels.gpu.depthwise_multi_kernel"
BACKWARD = f"{FORWARD}_backward"
LANES = "trifuse.kernels.gpu.lanes"
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


def laid_out(layout, shape, sides, **options):
    x, weights = random_arguments(shape, sides, **options)
    return x.detach().contiguous(memory_format=layout).requires_grad_(), weights


@interpreted
@LAYOUTS
@pytest.mark.parametrize("columns", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((1, 3, 8, 8), (3, 5)),  # strips that fill the width, rows four at once
        ((2, 3, 6, 9), (5,)),  # a last strip of one column, rows two at once
        ((1, 2, 5, 3), (7,)),  # fewer columns than a strip, rows one by one, a map smaller than the kernel
        ((1, 2, 2, 6), (7,)),  # more neighbours than a strip of two has columns
    ],
    ids=str,
)
def test_strips_of_columns(columns, shape, sides, layout):
    forward, backward = import_module(FORWARD).convolve, import_module(BACKWARD).weight_gradients
    with tuning.forced(forward, {"columns": columns}), tuning.forced(backward, {"columns": columns}):
        check("triton", *laid_out(layout, shape, sides))


@interpreted
@LAYOUTS
@pytest.mark.parametrize("height", [9, 12])
def test_few_lanes_share_out_the_rows(height, layout, monkeypatch):
    monkeypatch.setattr(import_module(LANES), "LEAST_ROWS", 2)
    check("triton", *laid_out(layout, (1, 3, height, 4), (3, 5)))


@interpreted
@LAYOUTS
def test_many_lanes_walk_several_samples(layout, monkeypatch):
    monkeypatch.setattr(import_module(LANES), "ENOUGH_LANES", 12)  # of 24: two samples each, and two groups of them
    check("triton", *laid_out(layout, (4, 3, 4, 3), (3, 5), x_grad=False))


@interpreted
@LAYOUTS
@pytest.mark.parametrize("enough_entries", [1, 1 << 14], ids=["many", "few"])
def test_gradient_of_the_kernels_adds_up_many_shares(enough_entries, layout, monkeypatch):
    module = import_module(BACKWARD)
    monkeypatch.setattr(module, "SUMMED", 2 * (module.MANY_ENTRIES if enough_entries == 1 else module.FEW_ENTRIES))
    monkeypatch.setattr(module, "ENOUGH_ENTRIES", enough_entries)
    check("triton", *laid_out(layout, (3, 5, 4, 5), (3, 1), x_grad=False))


@interpreted
@LAYOUTS
def test_kernels_wider_than_registers_hold(layout, monkeypatch):
    for module in (FORWARD, BACKWARD):
        monkeypatch.setattr(import_module(module), "WIDEST", 1)
    wide = import_module(f"{FORWARD}_wide")
    monkeypatch.setattr(wide, "TAPS", 2)
    monkeypatch.setattr(import_module(LANES), "ENOUGH_LANES", 3)
    with launches() as counted:
        check("triton", *laid_out(layout, (2, 3, 6, 5), (3, 5)))
    assert {"_wide_convolution_kernel", "_wide_gradient_kernel"} <= counted.kernels.keys()


@interpreted
def test_kernels_are_merged_once_for_both_passes():
    x, weights = random_arguments((1, 2, 3, 4), (1, 3))
    with backend("triton"):
        with launches() as forward:
            out = depthwise_multi_kernel(x, weights)
        with launches() as backward:
            out.sum().backward()
    assert forward.kernels.total() == 2
    assert backward.kernels.total() == 3
    assert (forward.kernels["_merge_kernel"], backward.kernels["_merge_kernel"]) == (1, 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_low_precision_terms_are_not_rounded_before_they_are_added(name):
    """1 + 1/512 is no bfloat16: the merged kernel must not be rounded to the map's type."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    weights = [torch.full((1, 1, 1, 1), value) for value in (1 / 512, -1.0)]
    with backend(name):
        assert depthwise_multi_kernel(x, weights).item() == 1 / 512


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 2, 9, 4)], ids=str)
def test_gradients_of_the_kernels_add_up_tiles_and_samples(shape, monkeypatch):
    """A CPU cuts the map into tiles: the last ones reach out of it, and the last samples are fewer."""
    operator = import_module("trifuse.kernels.ops.depthwise_multi_kernel")
    monkeypatch.setattr(operator, "TILE_SIDE", 4)
    monkeypatch.setattr(operator, "CHUNK_ELEMENTS", 2 * math.prod(shape[1:]))
    check("torch", *random_arguments(shape, (3, 5)))


def test_maps_are_convolved_as_they_are_stored(monkeypatch):
    """No copy in another memory format is made, whichever format the map has."""
    stored = []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda x, *rest, **options: stored.append(x) or convolve(x, *rest, **options)
    )
    x, weights = random_arguments((2, 3, 4, 5), (3,), x_grad=False, weights_grad=False)
    for one in (x, x.to(memory_format=torch.channels_last)):
        depthwise_multi_kernel(one, weights)
        assert stored.pop().data_ptr() == one.data_ptr()
