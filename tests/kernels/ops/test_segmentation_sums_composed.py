"""The gradient that a compiled step takes of the sums, written out: that of automatic differentiation."""

from __future__ import annotations

import pytest
import torch

from trifuse.kernels.ops import _segmentation_sums_composed as composed


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_the_gradient_is_that_of_automatic_differentiation(squared, direct):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    target = torch.randint(0, 3, (2, 1, 7), generator=generator)
    target[0, 0, 2] = 9
    counts, label, truth = composed._truth(target, maps[0], 9)
    sums = composed._sums(maps, label, counts, truth, squared, direct=True)
    weights = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in sums]
    expected = torch.autograd.grad(sum((w * each).sum() for w, each in zip(weights, sums, strict=True)), maps)
    found = composed._gradients([m.detach() for m in maps], label, counts, truth, weights, squared, direct=direct)
    assert len(found) == len(maps) + (not direct)
    for one, other in zip(found, expected, strict=False):
        torch.testing.assert_close(one, other)
