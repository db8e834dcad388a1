"""Context-aware fusion's passes over a map."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .errors import ShapeError

GATE = "spatial_gate"


def spatial_gate_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Define `spatial_gate`: multiply every position by the sigmoid of its gate."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute_dtype) * torch.sigmoid(gate.to(compute_dtype))).to(x.dtype)


def spatial_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every position by the sigmoid of its gate: (B, C, H, W), (B, 1, H, W) -> (B, C, H, W)."""
    if x.ndim != 4 or gate.shape != (x.shape[0], 1, *x.shape[2:]):
        raise ShapeError(
            f"{GATE}: x has shape {tuple(x.shape)} and gate {tuple(gate.shape)}; expected (B, C, H, W), (B, 1, H, W)"
        )
    _library.check_dtype(GATE, "x", x)
    return spatial_gate_reference(x, gate)
