"""Axial rotary positions: each head's queries and keys are turned by angles that grow with the patch's row and column.

Source: Su et al., RoFormer, section 3.2.2, on two axes as in Siméoni et al., DINOv3, section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trifuse.kernels.errors import ShapeError


@dataclass(frozen=True)
class RotaryPositions:
    """The angles of a grid's patches, which are the last tokens of a sequence; those before them are not turned.

    Attributes:
        cos: cosines, float32, of shape (M, 1, d / 2).
        sin: sines, likewise.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Turn queries or keys (B, P + M, heads, d), in float32 or wider whatever their type; the first P stay."""
        patches = len(self.cos)
        wide = torch.promote_types(x.dtype, torch.float32)
        first, second = x[:, -patches:].to(wide).chunk(2, dim=-1)
        cos, sin = self.cos.to(wide), self.sin.to(wide)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([x[:, :-patches], turned.to(x.dtype)], dim=1)


def axial_positions(
    grid: tuple[int, int], head_dim: int, base: float = 100.0, device: torch.device | None = None
) -> RotaryPositions:
    """Return the angles of a grid of patches, row by row, computed in float32.

    A quarter of a head's channel pairs turns with each of ``base ** -(4 k / d)``: half of them by the row, half by the
    column, both measured from -1 to 1 over the image, at the middle of a patch.

    Args:
        grid: (h, w).
        head_dim: channels d of a head.
        base: of the frequencies.
        device: of the result.

    Raises:
        ShapeError: d is no multiple of 4.
    """
    if head_dim % 4:
        raise ShapeError(f"axial_positions: expected a head_dim divisible by 4, got {head_dim}; use other heads")
    frequencies = 1 / base ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)
    rows, columns = (2.0 * (torch.arange(0.5, side, dtype=torch.float32, device=device) / side) - 1.0 for side in grid)
    middles = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (M, 2)
    angles = (2 * math.pi * middles[:, :, None] * frequencies).flatten(1)[:, None]  # (M, 1, d / 2)
    return RotaryPositions(angles.cos(), angles.sin())
