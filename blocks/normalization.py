"""The normalisations that a convolutional block may choose from."""

from __future__ import annotations

import math

from torch import Tensor, nn

from trifuse.kernels.errors import ShapeError

NORMS = ("batch", "instance", "group")
_MAX_GROUPS = 8


class BatchNorm(nn.BatchNorm2d):
    """Normalise each channel over batch and space; says what to do where there is a single value per channel."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            raise ShapeError(
                f"batch normalisation in training needs more than one value per channel, got shape "
                f"{tuple(input.shape)}; use a larger batch or image, or norm='group'"
            )
        return super().forward(input)


class InstanceNorm(nn.InstanceNorm2d):
    """Normalise each channel of each sample over space, with learned scale and shift."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=True)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2] * input.shape[3] == 1:
            raise ShapeError(
                f"instance normalisation needs more than one value per channel and sample, got shape "
                f"{tuple(input.shape)}; use a larger image, or norm='group'"
            )
        return super().forward(input)


def make_norm(kind: str, dim: int) -> nn.Module:
    """Return the normalisation of (B, dim, H, W) maps called ``kind``: ``"batch"``, ``"instance"`` or ``"group"``.

    Groups are eight, or the largest divisor of eight that divides ``dim``. All start as scale 1 and shift 0.
    """
    if kind == "batch":
        return BatchNorm(dim)
    if kind == "instance":
        return InstanceNorm(dim)
    if kind == "group":
        return nn.GroupNorm(math.gcd(_MAX_GROUPS, dim), dim)
    raise ValueError(f"unknown norm {kind!r}; use one of {', '.join(map(repr, NORMS))}")
