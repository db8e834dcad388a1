"""Which pairs of a shape and a type `make test` takes, and which gradients it asks for: a few, which prove the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch


def with_every_type(cases: Sequence[Any], types: Sequence[torch.dtype], at: int = 1) -> list[Any]:
    """Return each case with each type: every case with the first type and one case with every type, the rest as slow.

    Args:
        cases: what a type is added to; tuples in a list, e.g. ``[(shape,), ...]``.
        types: the first is the one in which every case is tested.
        at: index of the case that is tested in every type.
    """
    pairs = [(number, case, kind) for number, case in enumerate(cases) for kind in types]
    return [
        pytest.param(*case, kind, marks=() if kind == types[0] or number == at else pytest.mark.slow)
        for number, case, kind in pairs
    ]


def asked_gradients(count: int) -> list[tuple[bool, ...]]:
    """Return which of so many gradients are asked for: all of them, none, each alone, and all but each."""
    asked: list[tuple[bool, ...]] = []
    for others in (True, False):
        asked.append((others,) * count)
        asked += [tuple((k == one) != others for k in range(count)) for one in range(count)]
    return asked
