"""Symmetries of a slice: image and target move together, and the generator alone decides how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlipRotate:
    """Apply one of the eight symmetries of the square, each as likely as any other."""

    def __call__(self, image: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Turn an image (C, S, S) and its target (S, S) in the same way."""
        turns = int(torch.randint(4, (), generator=generator))
        mirrored = bool(torch.randint(2, (), generator=generator))
        return _turn(image, turns, mirrored), _turn(target, turns, mirrored)


def _turn(plane: Tensor, turns: int, mirrored: bool) -> Tensor:
    plane = torch.rot90(plane, turns, dims=(-2, -1))
    return (plane.flip(-1) if mirrored else plane).contiguous()
