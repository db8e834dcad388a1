"""What the mutation loss is compared with: one loss of Dice and cross-entropy for every subset of the maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from .dice_ce_loss import dice_and_cross_entropy, monai_dice_ce


def of_every_subset(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    """Return a loss of n maps: each map upsampled where it is coarse, and ``loss`` once for every non-empty subset."""

    def total(maps: Sequence[Tensor], target: Tensor) -> Tensor:
        size = target.shape[1:]
        full = [m if m.shape[2:] == size else F.interpolate(m, size=size, mode="bilinear") for m in maps]
        chosen = [subset for count in range(1, len(full) + 1) for subset in combinations(full, count)]
        return torch.stack([loss(sum(subset[1:], subset[0]), target) for subset in chosen]).sum()

    return total


separate_losses = of_every_subset(dice_and_cross_entropy)
separate_monai_losses = of_every_subset(monai_dice_ce)
compiled_separate_losses = torch.compile(separate_losses, dynamic=False)
