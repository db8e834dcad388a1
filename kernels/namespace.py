"""The operator namespace, ``torch.ops.trifuse``, in which no name is registered twice."""

from __future__ import annotations

import torch

from .errors import NamespaceTaken

NAMESPACE = "trifuse"


def _taken(name: str) -> NamespaceTaken:
    return NamespaceTaken(
        f"expected torch.ops.{name} to be free, but it was registered before, by another package or another copy of "
        "this one; load one of the two, or each in a process of its own"
    )


def _claimed() -> torch.library.Library:
    try:
        return torch.library.Library(NAMESPACE, "DEF")
    except RuntimeError as error:
        raise _taken(NAMESPACE) from error


registry = _claimed()


def define(schema: str) -> None:
    """Define an operator.

    Raises:
        NamespaceTaken: there is one of this name. Torch would put the second in its place without a word.
    """
    name = schema.split("(")[0]
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        raise _taken(f"{NAMESPACE}.{name}")
    registry.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
