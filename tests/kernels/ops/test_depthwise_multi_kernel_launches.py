"""How the depthwise multi-kernel convolution is cut into launches and tiles, and which addresses it reaches."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from depthwise_arguments import BACKENDS, check, interpreted, random_arguments

from trifuse.kernels import backend, depthwise_multi_kernel

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


@interpreted
def test_gradient_of_the_kernels_adds_up_many_tiles_in_few_shares(monkeypatch):
    monkeypatch.setattr(import_module("trifuse.kernels.gpu.depthwise_multi_kernel"), "MAX_SHARES", 3)
    check("triton", *random_arguments((2, 2, 9, 4), (3,), x_grad=False))


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
