"""The operator namespace, ``torch.ops.trifuse``, where no name is registered twice."""

from __future__ import annotations

import torch

from .errors import NamespaceTaken

NAMESPACE = "trifuse"
registry = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str) -> None:
    """Define an operator.

    Raises:
        NamespaceTaken: there is one of this name. Torch would put the second in its place without a word.
    """
    name = schema.split("(")[0]
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        raise NamespaceTaken(
            f"expected the name torch.ops.{NAMESPACE}.{name} to be free, but an operator of that name was registered "
            "before, by another package or another copy of this one; load one of the two, or each in a process of its "
            "own"
        )
    registry.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
