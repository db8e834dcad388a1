"""The temporal FiLM gate: a map mixed with an ECG's vector, and modulated by the days between image and ECG."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trifuse.kernels import ShapeError, temporal_film_gate

from .float32_linear import ZeroInitMlp
from .plain_layers import dtype_of


class TimeModulation(nn.Module):
    """What makes of the days between image and ECG a scale and a shift of C channels; see `TemporalFiLMGate`."""

    def __init__(self, dim: int, hidden: int = 64, max_days: float = 90) -> None:
        super().__init__()
        if not 0 < max_days < math.inf:
            raise ValueError(f"TemporalFiLMGate: max_days must be positive and finite, got {max_days}")
        self.dim, self.max_days = dim, max_days
        self.mlp = ZeroInitMlp(1, hidden, 2 * dim)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the first layer's weights as `torch.nn.Linear` does, and set the second layer to zero."""
        self.mlp.reset_parameters(generator)

    def scaled(self, interval: Tensor | float, features: Tensor) -> Tensor:
        """Return intervals in days as t in [0, 1]: (B, 1), in float32 or wider, where the maps are."""
        return scaled_days(interval, features, self.max_days, dtype_of(self.mlp))

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma and beta, (B, C) each, for scaled intervals (B, 1)."""
        gamma, beta = self.mlp(t).chunk(2, dim=1)
        return gamma, beta

    def extra_repr(self) -> str:
        return f"dim={self.dim}, max_days={self.max_days}"


def scaled_days(interval: Tensor | float, features: Tensor, max_days: float, dtype: torch.dtype) -> Tensor:
    """Return intervals in days as t in [0, 1]: (B, 1), in a type or in float32 if that is wider, where the maps are."""
    dtype = torch.promote_types(dtype, torch.float32)
    device, batch = features.device, features.shape[0]
    if isinstance(interval, int | float):  # filled in where the maps are: nothing is copied there
        days = torch.full((), interval, dtype=dtype, device=device)
    else:
        days = torch.as_tensor(interval, dtype=dtype, device=device)
    if tuple(days.shape) not in ((), (batch,), (batch, 1)):
        raise ShapeError(
            f"TemporalFiLMGate: interval has shape {tuple(days.shape)}; expected ({batch},) or ({batch}, 1), the "
            "days of each sample, or one number for all"
        )
    return (days / max_days).clamp(0, 1).view(-1, 1).expand(batch, 1)


class TemporalFiLM(TimeModulation):
    """Compute the scale and the shift alone: scaled intervals (B, 1) -> gamma and beta, (B, C) each.

    Args: see `TemporalFiLMGate`.
    """

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.modulation(t)


class TemporalFiLMGate(TimeModulation):
    """Mix a map with a vector, modulate the mixture by the time between them, and add it to the map.

    With t the days between them, divided by ``max_days`` and cut to [0, 1]:

        gamma, beta = the halves of second(relu(first(t)))                           (B, C) each
        out         = features + (features * w_mri + ecg * w_ecg) * (1 + gamma) + beta

    The second layer starts as zero, so that time changes nothing at first. Both layers are computed in float32 or
    wider, under autocast as well.

    Args:
        dim: channels C.
        hidden: width between the two layers.
        max_days: days from which on all intervals count as equally long.

    Raises:
        ValueError: ``max_days`` that are not positive and finite.

    Source: temporal-aware feature fusion of TAFF-UNet; FiLM is Perez et al., 2018.
    """

    def forward(self, features: Tensor, ecg: Tensor, weights: Tensor, interval: Tensor | float) -> Tensor:
        """Fuse.

        Args:
            features: maps (B, C, H, W).
            ecg: one vector per sample, (B, C).
            weights: w_mri and w_ecg of each sample, (B, 2).
            interval: days between image and ECG: (B,), (B, 1), or one number for all samples, whole or not. Negative
                ones count as 0; NaN gives NaN.

        Returns:
            Tensor of shape (B, C, H, W) in the type of features.

        Raises:
            ShapeError: an argument has another shape.
        """
        gamma, beta = self.modulation(self.scaled(interval, features))
        return temporal_film_gate(features, ecg, weights, gamma, beta)
