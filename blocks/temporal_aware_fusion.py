"""Temporal-aware feature fusion: an ECG's code, weighed against the image and modulated by the days between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import ShapeError, temporal_film_gate

from .float32_linear import Float32Linear, ZeroInitMlp
from .temporal_film_gate import TemporalFiLMGate

HIDDEN = 64


class TemporalAwareFusion(nn.Module):
    """Fuse a map with the code of an ECG that was taken some days from it: (B, C, H, W), (B, E) -> (B, C, H, W).

    With t the days between them, divided by ``max_days`` and cut to [0, 1]::

        p                = projection(code)                                    (B, C), the same at every position
        [w_mri, w_ecg]   = softmax(gate(cat(mean of f over positions, code)))  (B, 2)
        gamma, beta      = film(t)                                             (B, C) each; 0 without time
        fused            = f + (f * w_mri + p * w_ecg) * (1 + gamma) + beta

    The last layers of gate and film start as zero: the weights start equal, and time changes nothing at first. The
    projection, the two networks and the softmax are computed in float32 or wider, under autocast as well.

    A sample without an ECG comes out exactly as it came in, with weights (0, 0). Whatever stands in its code and
    interval, NaN included, changes neither a result nor a gradient, and it trains nothing.

    Mind what comes next: a convolution with an instance norm takes away what is the same at every position of a
    channel, and a scale that all channels share. There, as in a plain U-Net, the code reaches the result through the
    padding of the border and little else, however much the gate gives it; ``spatial_mlp`` is not taken away.

    Args:
        dim: channels C.
        ecg_dim: width E of the code.
        time: whether the interval counts; without, there is no film, and intervals are not looked at.
        max_days: days from which on all intervals count as equally long.
        zero_init_proj: let the projection start as zero, too.
        gate_sees_time: give the gate t beside the mean and the code.
        spatial_mlp: side s of a coarse grid: the projection then gives (B, C, s, s), which is brought to the map's size
            bilinearly, in place of one value per channel.

    Raises:
        ValueError: ``gate_sees_time`` without ``time``, or a grid without positions.

    Source: temporal-aware feature fusion of TAFF-UNet; FiLM is Perez et al., 2018.
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
        if gate_sees_time and not time:
            raise ValueError("TemporalAwareFusion: gate_sees_time needs time=True, got time=False")
        if spatial_mlp is not None and spatial_mlp < 1:
            raise ValueError(f"TemporalAwareFusion: spatial_mlp must be at least 1, or None, got {spatial_mlp}")
        self.dim, self.ecg_dim, self.spatial_mlp = dim, ecg_dim, spatial_mlp
        self.zero_init_proj, self.gate_sees_time = zero_init_proj, gate_sees_time
        self.projection = Float32Linear(ecg_dim, dim * (spatial_mlp or 1) ** 2)
        self.gate = ZeroInitMlp(dim + ecg_dim + gate_sees_time, HIDDEN, 2)
        self.film = TemporalFiLMGate(dim, HIDDEN, max_days) if time else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights as `torch.nn.Linear` does, and set to zero what starts as zero."""
        self.projection.reset_parameters(generator)
        if self.zero_init_proj:  # drawn all the same: with one seed, the option changes no other weight
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        self.gate.reset_parameters(generator)
        if self.film is not None:
            self.film.reset_parameters(generator)

    def forward(
        self,
        features: Tensor,
        ecg_code: Tensor,
        interval: Tensor | float | None = None,
        has_ecg: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            features: maps (B, C, H, W).
            ecg_code: one code per sample, (B, E).
            interval: days between image and ECG: (B,), (B, 1), or one number for all samples, whole or not. Negative
                ones count as 0.
            has_ecg: which samples have an ECG, bool of shape (B,); None says all of them.

        Returns:
            The fused maps (B, C, H, W), in the type of features, and the weights (B, 2) of image and ECG, float32 or
            wider.

        Raises:
            ShapeError: an argument has another shape.
            TypeError: ``has_ecg`` is not of bools.
            ValueError: no interval where time counts.
        """
        self._check(features, ecg_code, has_ecg)
        everyone = torch.ones(features.shape[0], dtype=torch.bool, device=features.device)
        present = (everyone if has_ecg is None else has_ecg)[:, None]
        dtype = torch.promote_types(self.projection.weight.dtype, torch.float32)
        # Chosen before and after every network: 0 * NaN is NaN, in a gradient as well.
        code = torch.where(present, ecg_code.to(dtype), 0.0)
        seen = [features.mean((2, 3), dtype=dtype), code]
        gamma = beta = torch.zeros(features.shape[:2], dtype=dtype, device=features.device)
        if self.film is not None:
            if interval is None:
                raise ValueError(
                    "TemporalAwareFusion: interval is None; expected the days between image and ECG, of shape (B,); or "
                    "build the block with time=False"
                )
            t = torch.where(present, self.film.scaled(interval, features), 0.0)
            gamma, beta = (torch.where(present, half, 0.0) for half in self.film.modulation(t))
            seen += [t] if self.gate_sees_time else []
        logits = self.gate(torch.where(present, torch.cat(seen, dim=1), 0.0))
        weights = torch.where(present, torch.softmax(logits, dim=1), 0.0)
        return self._fuse(features, self.projection(code), weights, gamma, beta), weights

    def _fuse(self, features: Tensor, projected: Tensor, weights: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        if self.spatial_mlp is None:
            return temporal_film_gate(features, projected, weights, gamma, beta)
        grid = projected.unflatten(1, (self.dim, self.spatial_mlp, self.spatial_mlp))
        spread = F.interpolate(grid, features.shape[2:], mode="bilinear", align_corners=False)
        w_mri, w_ecg = weights[:, :, None, None, None].unbind(1)
        modulation = 1 + gamma[:, :, None, None]
        fused = features * (1 + w_mri * modulation) + spread * (w_ecg * modulation) + beta[:, :, None, None]
        return fused.to(features.dtype)

    def _check(self, features: Tensor, ecg_code: Tensor, has_ecg: Tensor | None) -> None:
        if features.ndim != 4 or features.shape[1] != self.dim:
            raise ShapeError(
                f"TemporalAwareFusion: features has shape {tuple(features.shape)}; expected (B, {self.dim}, H, W); "
                "bring channels-last data there with x.permute(0, 3, 1, 2)"
            )
        batch = features.shape[0]
        if tuple(ecg_code.shape) != (batch, self.ecg_dim):
            raise ShapeError(
                f"TemporalAwareFusion: ecg_code has shape {tuple(ecg_code.shape)}; expected ({batch}, {self.ecg_dim}), "
                "one code for each map"
            )
        if has_ecg is None:
            return
        if has_ecg.dtype != torch.bool:
            raise TypeError(f"TemporalAwareFusion: has_ecg is {has_ecg.dtype}; expected torch.bool; use .bool()")
        if tuple(has_ecg.shape) != (batch,):
            raise ShapeError(
                f"TemporalAwareFusion: has_ecg has shape {tuple(has_ecg.shape)}; expected ({batch},), one for each map"
            )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, ecg_dim={self.ecg_dim}, zero_init_proj={self.zero_init_proj}, "
            f"gate_sees_time={self.gate_sees_time}, spatial_mlp={self.spatial_mlp}"
        )
