"""What the temporal FiLM gate is compared with: its equations, with the ECG as a map of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def film_by_the_equations(features: Tensor, ecg: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Fuse as the equations are written: the projected ECG as a map of its own, then the mixture, then FiLM."""
    dtype = features.dtype
    ecg_map = ecg.to(dtype)[:, :, None, None].expand_as(features)
    w_mri, w_ecg = weights.to(dtype)[:, :, None, None, None].unbind(1)
    mixed = features * w_mri + ecg_map * w_ecg
    return features + mixed * (1 + scale.to(dtype)[:, :, None, None]) + shift.to(dtype)[:, :, None, None]


compiled_film = torch.compile(film_by_the_equations, dynamic=False)
