"""The grid of temporal-aware fusion: where an image lay, beyond its border, and maps without a position."""

from __future__ import annotations

import pytest
import torch
from fusion_equations import random_arguments, random_block

from trifuse.kernels import DataError

NAN = float("nan")


def grid_block():
    return random_block(dtype=torch.float32, projection="grid"), random_arguments(dtype=torch.float32)


def test_b9_where_an_image_without_an_ecg_lay_does_not_count():
    block, (features, code, days) = grid_block()
    transform = torch.eye(2, 3).repeat(3, 1, 1)
    has_ecg = torch.tensor([True, False, True])
    expected, _ = block(features, code, days, has_ecg, transform=transform)
    transform[1] = NAN
    found, _ = block(features, code, days, has_ecg, transform=transform)
    assert torch.equal(found, expected)


def test_a_grid_is_not_sampled_where_no_number_says():
    """Backward through such a sample reads memory that is not its own."""
    block, (features, code, days) = grid_block()
    with pytest.raises(DataError, match=r"transform: expected finite numbers, got NaN or infinity; \[\[1, 0, 0\]"):
        block(features, code, days, transform=torch.full((3, 2, 3), NAN))


def test_a_turned_grid_goes_on_beyond_its_border():
    block, (_, code, days) = grid_block()
    torch.nn.init.zeros_(block.projection.weight)
    torch.nn.init.ones_(block.projection.bias)
    turned = torch.tensor([[0.7, -0.7, 0.0], [0.7, 0.7, 0.0]]).repeat(3, 1, 1)
    fused, _ = block(torch.zeros(3, 4, 8, 8), code, days, transform=turned)
    torch.testing.assert_close(fused, fused[..., 4:5, 4:5].expand_as(fused))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("keep", [(slice(0),), (..., slice(0))], ids=["no sample", "no column"])
def test_a_grid_takes_maps_without_a_position(moved, keep):
    block, (features, code, days) = grid_block()
    features = features[keep]
    batch = len(features)
    transform = torch.eye(2, 3).repeat(batch, 1, 1) if moved else None
    fused, weights = block(features, code[:batch], days[:batch], transform=transform)
    assert fused.shape == features.shape
    assert weights.shape == (batch, 2)
