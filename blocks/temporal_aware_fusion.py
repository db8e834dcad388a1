"""Temporal-aware feature fusion: an ECG's code, weighed against the image and modulated by the days between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trifuse.kernels import temporal_film_gate

from .temporal_film_gate import TemporalFiLMGate, scaled_interval

HIDDEN = 64


class TemporalAwareFusion(nn.Module):
    """Fuse a map with the code of an ECG taken some days from it: (B, C, H, W), (B, E) -> (B, C, H, W), (B, 2).

    p           = projection(code)                                        (B, C), spread over the map
    w           = softmax(gate(cat(mean of f over positions, code)))      (B, 2) = w_mri, w_ecg
    gamma, beta = film(t), 0 without time
    fused       = f + (f * w_mri + p * w_ecg) * (1 + gamma) + beta
    """

    def __init__(
        self,
        dim: int,
        ecg_dim: int = 64,
        time: bool = True,
        max_days: float = 90,
        zero_init_proj: bool = False,
        gate_sees_time: bool = False,
        spatial_mlp: int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.ecg_dim, self.max_days = dim, ecg_dim, max_days
        self.projection = nn.Linear(ecg_dim, dim)
        self.gate = nn.Sequential(nn.Linear(dim + ecg_dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
        self.film = TemporalFiLMGate(dim, HIDDEN, max_days) if time else None
        nn.init.zeros_(self.gate[2].weight)
        nn.init.zeros_(self.gate[2].bias)

    def forward(
        self,
        features: Tensor,
        ecg_code: Tensor,
        interval: Tensor | float | None = None,
        has_ecg: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse; samples whose ``has_ecg`` is False come out as they are, with weights (0, 0)."""
        present = torch.ones(len(features), dtype=torch.bool, device=features.device) if has_ecg is None else has_ecg
        present = present.bool().view(-1, 1)
        code = torch.where(present, ecg_code.float(), 0.0)
        with torch.autocast(features.device.type, enabled=False):
            p = self.projection(code)
            means = features.mean((2, 3), dtype=torch.float32)
            weights = torch.softmax(self.gate(torch.cat([means, code], dim=1)), dim=1)
            weights = torch.where(present, weights, 0.0)
            gamma = beta = torch.zeros_like(p)
            if self.film is not None:
                t = torch.where(present, scaled_interval(interval, features, self.max_days), 0.0)
                gamma, beta = (torch.where(present, part, 0.0) for part in self.film.modulation(t))
        return temporal_film_gate(features, p, weights, gamma, beta), weights
