"""The temporal FiLM gate: a map mixed with an ECG's vector and modulated by the days between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trifuse.kernels import ShapeError, temporal_film_gate


class TemporalFiLMGate(nn.Module):
    """Mix a map with a vector, and modulate the mixture by the time between them: (B, C, H, W) -> (B, C, H, W).

        t           = clamp(interval / max_days, 0, 1)
        gamma, beta = halves of linear2(relu(linear1(t)))            (B, C) each
        out         = features + (features * w_mri + ecg * w_ecg) * (1 + gamma) + beta

    The second layer starts at zero, and with it gamma and beta. Both are computed in float32, under autocast as well.

    Args:
        dim: channels C.
        hidden: width between the two layers.
        max_days: the interval at and above which t is 1, in days.

    Source: temporal-aware feature fusion of TAFF-UNet; FiLM is Perez et al., 2018.
    """

    def __init__(self, dim: int, hidden: int = 64, max_days: float = 90) -> None:
        super().__init__()
        self.dim, self.max_days = dim, max_days
        self.mlp = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 2 * dim))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, features: Tensor, ecg: Tensor, weights: Tensor, interval: Tensor | float) -> Tensor:
        """Fuse.

        Args:
            features: maps (B, C, H, W).
            ecg: the ECG's vector, (B, C).
            weights: w_mri and w_ecg of each sample, (B, 2).
            interval: days between ECG and image, of shape (B,) or (B, 1), or one number for all samples.

        Raises:
            ShapeError: an argument has another shape.
        """
        gamma, beta = self.modulation(scaled_interval(interval, features, self.max_days))
        return temporal_film_gate(features, ecg, weights, gamma, beta)

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma and beta, (B, C) each in float32, for scaled intervals t of shape (B, 1)."""
        first, _, second = self.mlp
        with torch.autocast(t.device.type, enabled=False):
            hidden = torch.relu(nn.functional.linear(t.float(), first.weight.float(), first.bias.float()))
            gamma, beta = nn.functional.linear(hidden, second.weight.float(), second.bias.float()).chunk(2, dim=1)
        return gamma, beta

    def extra_repr(self) -> str:
        return f"dim={self.dim}, max_days={self.max_days}"


def scaled_interval(interval: Tensor | float, features: Tensor, max_days: float) -> Tensor:
    """Return intervals in days as t in [0, 1], float32 of shape (B, 1), on the device of the maps.

    Raises:
        ShapeError: an interval that is neither one number nor (B,) nor (B, 1).
    """
    days = torch.as_tensor(interval, dtype=torch.float32, device=features.device)
    batch = len(features)
    if days.ndim and tuple(days.shape) not in ((batch,), (batch, 1)):
        raise ShapeError(
            f"interval has shape {tuple(days.shape)}; expected ({batch},) or ({batch}, 1), the days of each sample, or "
            "one number"
        )
    return (days.reshape(-1, 1) / max_days).clamp(0, 1).expand(batch, 1)
