"""The check of the operators that take one map (B, C, H, W)."""

from __future__ import annotations

from torch import Tensor

from trifuse.kernels.errors import ShapeError


def check_map(op: str, name: str, x: Tensor) -> None:
    """Refuse what has fewer or more than four axes, and say how to add those that are missing or fold the others.

    Raises:
        ShapeError: it is no map.
    """
    if x.ndim == 4:
        return
    remedy = f"add what is missing with {name}[None]"
    if x.ndim > 4:
        remedy = f"fold frames (B, T, C, H, W) with {name}.flatten(0, 1), volumes (B, C, D, H, W) with "
        remedy += f"{name}.flatten(2, 3)"
    raise ShapeError(f"{op}: {name} has shape {tuple(x.shape)}; expected (B, C, H, W); {remedy}")
