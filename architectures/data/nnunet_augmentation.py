"""nnU-Net's augmentation of 2-D patches: image, labels and prior move together, and the generator decides how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NnUNetAugmentation:
    """Augment patches as nnU-Net does."""

    mirror_axes: tuple[int, ...] = (-2, -1)

    def __call__(
        self, image: Tensor, target: Tensor, prior: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Change an image (1, P, P), its target (P, P) and its prior (P, P), if there is one."""
        draws = torch.rand(len(self.mirror_axes), generator=generator)
        axes = [axis for axis, draw in zip(self.mirror_axes, draws, strict=True) if draw < 0.5]
        return image.flip(axes), target.flip(axes), None if prior is None else prior.flip(axes)
