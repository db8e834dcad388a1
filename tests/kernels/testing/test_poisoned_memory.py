"""Memory that nobody has written shows, however it was allocated."""

from __future__ import annotations

import torch
from ready_python import run_python

from trifuse.kernels.testing import poisoned_empty


def test_poison_reaches_every_way_to_allocate():
    x = torch.ones(3)
    plain = torch.empty
    with poisoned_empty():
        fresh = [torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,))]
        assert all(tensor.isnan().all() for tensor in fresh)
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    assert torch.empty is plain


FIRST_USED_INSIDE = """
import torch
from trifuse.kernels.testing import poisoned_empty
with poisoned_empty(), torch.device("meta"):
    torch.empty(1)
with torch.device("meta"):
    assert torch.empty(1).is_meta
"""


def test_a_device_as_context_holds_afterwards_even_if_it_was_first_used_inside():
    child = run_python("-c", FIRST_USED_INSIDE)
    assert child.returncode == 0, child.stderr
