"""What blocks refuse: each thing that is wrong with a map alone."""

from __future__ import annotations

import pytest
import torch

from trifuse.blocks.image_input import check_map
from trifuse.kernels import ShapeError


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 5, 6, 3), (3, 5, 6), (2, 3, 5), (2, 3, 4, 5, 6)])
def test_other_channels_or_other_dimensions_are_refused(shape):
    check_map("Block", "x", torch.zeros(2, 3, 5, 6), 3)
    with pytest.raises(ShapeError, match=r"Block: x has shape \(.*\); expected \(B, 3, H, W\); bring channels-last"):
        check_map("Block", "x", torch.zeros(shape), 3)
