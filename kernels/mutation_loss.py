"""The MUTATION loss: Dice and cross-entropy of the sum of every subset of a network's outputs.

L = reduce_S [ gamma * Dice(z_S, y) + (1 - gamma) * CE(z_S, y) ],   z_S = sum_{i in S} P_i,   S a non-empty subset
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .dice_ce_loss import dice_ce_loss_reference
from .errors import ShapeError
from .segmentation_sums import check_maps, dice_ce, segmentation_sums, subsets_of, upsampled

OP = "mutation_loss"
SUBSETS = ("mutation", "deep_supervision", "last")
REDUCTIONS = ("sum", "mean")
MOST_MAPS = 5  # 31 subsets


def mutation_loss_reference(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    gamma: float = 0.4,
    subsets: str = "mutation",
    reduction: str = "sum",
    ignore_index: int | None = None,
) -> Tensor:
    """Define `mutation_loss`: bring all maps to the target's size, and add up one loss for each subset."""
    full = [upsampled(m, target.shape[1:]) for m in logits]
    n = len(full)
    chosen = {"mutation": subsets_of(n), "deep_supervision": [(i,) for i in range(n)], "last": [(n - 1,)]}[subsets]
    losses = [
        dice_ce_loss_reference(
            torch.stack([full[i] for i in subset]).sum(0),
            target,
            flavour="transunet",
            w_ce=1 - gamma,
            w_dice=gamma,
            ignore_index=ignore_index,
        )
        for subset in chosen
    ]
    return torch.stack(losses).sum() if reduction == "sum" else torch.stack(losses).mean()


def mutation_loss(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    gamma: float = 0.4,
    subsets: str = "mutation",
    reduction: str = "sum",
    ignore_index: int | None = None,
) -> Tensor:
    """Return the MUTATION loss."""
    return mutation_loss_of_ranks(
        logits, target, gamma=gamma, subsets=subsets, reduction=reduction, ignore_index=ignore_index
    )


def mutation_loss_of_ranks(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    gamma: float,
    subsets: str,
    reduction: str,
    ignore_index: int | None,
    sample_weight: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the MUTATION loss of samples that are weighed, and spread over ranks.

    Args: as of `mutation_loss`, and

        sample_weight: of shape (B,); 0 makes a sample count for nothing.
        reduce: adds a tensor up over all ranks, differentiably.
    """
    maps = list(logits)
    if not maps or len(maps) > MOST_MAPS:
        raise ShapeError(f"{OP}: expected 1 to {MOST_MAPS} logit maps, got {len(maps)}")
    check_maps(OP, maps, target, ignore_index)
    if subsets not in SUBSETS:
        raise ValueError(f"{OP}: expected subsets to be one of {SUBSETS}, got {subsets!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: expected reduction to be one of {REDUCTIONS}, got {reduction!r}")
    groups = {"mutation": [maps], "deep_supervision": [[m] for m in maps], "last": [maps[-1:]]}[subsets]
    losses = [
        dice_ce(
            segmentation_sums(group, target, squared=True, ignore_index=ignore_index),
            flavour="transunet",
            batch_dice=True,
            w_ce=1 - gamma,
            w_dice=gamma,
            sample_weight=sample_weight,
            reduce=reduce,
        )
        for group in groups
    ]
    return torch.cat(losses).sum() if reduction == "sum" else torch.cat(losses).mean()
