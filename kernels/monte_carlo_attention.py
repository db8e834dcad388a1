"""Monte Carlo attention's two passes over a map: pool one drawn cell, and scale every channel by its gate.

    pooled[b, c] = mean of x[b, c, p] over the positions p of one cell of a scale x scale adaptive grid
    gated[b, c, h, w] = x[b, c, h, w] * sigmoid(gate[b, c])

Row i of a grid of k rows covers the image rows from floor(i H / k) to ceil((i + 1) H / k): neighbours overlap where k
does not divide H. With a permutation, position p of the grid stands for position permutation[p] of the map.

    d pooled / d x:  grad / (size of the cell) at the chosen positions, zero elsewhere
    d gated / d x:   grad * s,                            s = sigmoid(gate)
    d gated / d gate:  s (1 - s) * sum_{h, w} grad * x

Source: Monte Carlo attention of SvANet, as FIAS uses it in its decoder (equations 9 and 10).

What fusing saves: only the drawn cell is read, 1 / scale^2 of the map, where adaptive pooling reads all of it and a
shuffle copies it first. Gating saves nothing but its arguments, and its backward makes no map but the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .errors import ShapeError

POOL = "monte_carlo_pool"
GATE = "channel_gate"


def monte_carlo_pool_reference(
    x: Tensor, *, scale: int | Tensor, cell: int | Tensor, permutation: Tensor | None = None
) -> Tensor:
    """Define `monte_carlo_pool`: permute every sample's positions, cut its cell out, and average."""
    maps = x.to(torch.promote_types(x.dtype, torch.float32))
    if permutation is not None:
        order = permutation.expand(len(x), -1)[:, None].expand(-1, x.shape[1], -1)
        maps = maps.flatten(2).gather(2, order).view(x.shape)
    scales, cells = (torch.as_tensor(value).expand(len(x)).tolist() for value in (scale, cell))
    pooled = [_cell_of(sample, *draw).mean((1, 2)) for sample, *draw in zip(maps, scales, cells, strict=True)]
    return (torch.stack(pooled) if pooled else maps.mean((2, 3))).to(x.dtype)


def channel_gate_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Define `channel_gate`: multiply each channel by the sigmoid of its gate."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute_dtype) * torch.sigmoid(gate.to(compute_dtype))[:, :, None, None]).to(x.dtype)


def cell_edges(length: int, scale: int, index: int) -> tuple[int, int]:
    """Return the first position of one interval of an adaptive grid over ``length`` positions, and the one past it."""
    return index * length // scale, -(-(index + 1) * length // scale)


def _cell_of(maps: Tensor, scale: int, cell: int) -> Tensor:
    """Cut one cell out of maps (..., H, W), as a view."""
    top, bottom = cell_edges(maps.shape[-2], scale, cell // scale)
    left, right = cell_edges(maps.shape[-1], scale, cell % scale)
    return maps[..., top:bottom, left:right]


def monte_carlo_pool(
    x: Tensor, *, scale: int | Tensor, cell: int | Tensor, permutation: Tensor | None = None
) -> Tensor:
    """Average one cell of a scale x scale adaptive grid over each sample: (B, C, H, W) -> (B, C)."""
    return monte_carlo_pool_reference(x, scale=scale, cell=cell, permutation=permutation)


def channel_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every channel by the sigmoid of its gate: (B, C, H, W), (B, C) -> (B, C, H, W)."""
    if x.ndim != 4 or gate.shape != x.shape[:2]:
        raise ShapeError(
            f"{GATE}: x has shape {tuple(x.shape)} and gate {tuple(gate.shape)}; expected (B, C, H, W), (B, C)"
        )
    _library.check_dtype(GATE, "x", x)
    return channel_gate_reference(x, gate)
