"""Memory that nobody has written shows, however it was allocated."""

from __future__ import annotations

import torch

from trifuse.kernels.testing import poisoned_empty


def test_poison_reaches_every_way_to_allocate():
    x = torch.ones(3)
    plain = torch.empty
    with poisoned_empty():
        fresh = [torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,))]
        assert all(tensor.isnan().all() for tensor in fresh)
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    assert torch.empty is plain
