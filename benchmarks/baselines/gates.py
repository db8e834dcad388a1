"""What the gates are compared with: a sigmoid, and a product in which it is broadcast."""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast_channel_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Gate channels as squeeze-and-excitation modules do."""
    return x * torch.sigmoid(gate)[:, :, None, None]


def broadcast_spatial_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Gate positions as spatial attention modules do."""
    return x * torch.sigmoid(gate)


compiled_channel_gate = torch.compile(broadcast_channel_gate, dynamic=False)
compiled_spatial_gate = torch.compile(broadcast_spatial_gate, dynamic=False)
