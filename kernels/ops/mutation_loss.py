"""The MUTATION loss: Dice and cross-entropy of the sum of every subset of a network's outputs.

    L = reduce_S [ gamma * Dice(z_S, y) + (1 - gamma) * CE(z_S, y) ],   z_S = sum_{i in S} P_i,   S a non-empty subset
    dL / dP_i = sum over the subsets that contain i of dL / dz_S

Dice is that of all K classes with squared denominators, over batch and pixels together, as a loss: "transunet" of
`trifuse.kernels.ops.dice_ce_loss`.

Sources: Rahman and Marculescu, MERIT, MIDL 2023, for the loss; FIAS, equation 11, for gamma = 0.4.

What fusing saves: three maps have seven subsets, and each loss written out makes a sum, a softmax, a one-hot truth and
their products, about a hundred passes over maps, seven maps kept for backward. Here forward reads the maps once and
backward reads them once and writes their gradients. Coarse maps are upsampled inside: no full-resolution logits or
gradients exist. The logits, the target and O(K) sums are all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trifuse.kernels.choices import check_choice
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.library import forced_backend
from trifuse.kernels.scalars import check_number

from ._segmentation_loss import segmentation_loss
from ._segmentation_sums import check_maps
from ._segmentation_sums_composed import subsets_of, upsampled
from .dice_ce_loss import dice_ce_loss_reference

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
    chosen = subsets_of(n) if subsets == "mutation" else [(i,) for i in range(n)]
    chosen = chosen[-1:] if subsets == "last" else chosen
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
    """Return the loss over all subsets of some logit maps, a scalar.

    Sums are taken in float32 (float64 for float64). Deterministic on every backend; can be differentiated once.

    Args:
        logits: sequence of n = 1 to 5 maps (B, K, h, w) of one type, each at the target's size, or coarser: then it is
            upsampled bilinearly (align_corners=False) inside.
        target: class of every pixel, int64 of shape (B, H, W).
        gamma: weight of the Dice; 1 - gamma is that of the cross-entropy.
        subsets: "mutation" for all 2**n - 1, "deep_supervision" for each map alone, "last" for the last map alone.
        reduction: "sum" or "mean" over the subsets.
        ignore_index: a class of the target whose pixels count for nothing.

    Returns:
        Scalar in float32, float64 for float64 logits. NaN for a target outside [0, K) where the target is not on a CPU:
        a GPU is not made to wait for that check. NaN for a NaN logit, at an ignored pixel too, and for an infinite
        logit of a map that is upsampled: there, rule a class out by a large negative number.

    Raises:
        ShapeError: one tensor instead of a sequence, no maps, more than 5, or maps and target that do not belong
            together.
        TypeError: logits that are not floating point or of different types, or a target that is not int64.
        ValueError: an unknown option, or on a CPU a class outside [0, K).

    Examples:
        >>> heads = [torch.randn(2, 9, size, size, requires_grad=True) for size in (16, 32, 64)]
        >>> loss = mutation_loss(heads, torch.zeros(2, 256, 256, dtype=torch.int64))

    Source: see the module's docstring.
    """
    if forced_backend() == "reference":
        maps = _checked(logits, target, gamma, subsets, reduction, ignore_index)
        return mutation_loss_reference(
            maps, target, gamma=gamma, subsets=subsets, reduction=reduction, ignore_index=ignore_index
        )
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
    maps = _checked(logits, target, gamma, subsets, reduction, ignore_index)
    together = maps[-1:] if subsets == "last" else maps
    groups = [[m] for m in maps] if subsets == "deep_supervision" else [together]
    losses = [
        segmentation_loss(
            group,
            target,
            flavour="transunet",
            batch_dice=True,
            w_ce=1 - gamma,
            w_dice=gamma,
            ignore_index=ignore_index,
            sample_weight=sample_weight,
            reduce=reduce,
        )
        for group in groups
    ]
    every = losses[0] if len(losses) == 1 else torch.cat(losses)
    return every.sum() if reduction == "sum" else every.mean()


def _checked(
    logits: Sequence[Tensor], target: Tensor, gamma: float, subsets: str, reduction: str, ignore_index: int | None
) -> list[Tensor]:
    """Return the maps as a list, or raise what is wrong with the arguments."""
    if isinstance(logits, Tensor):
        raise ShapeError(f"{OP}: logits is one tensor; expected a sequence of maps (B, K, h, w); pass [logits]")
    maps = list(logits)
    if not maps or len(maps) > MOST_MAPS:
        raise ShapeError(f"{OP}: expected 1 to {MOST_MAPS} logit maps, got {len(maps)}")
    check_maps(OP, maps, target, ignore_index)
    check_number(f"{OP}: gamma", gamma)
    check_choice(f"{OP}: subsets", subsets, SUBSETS)
    check_choice(f"{OP}: reduction", reduction, REDUCTIONS)
    if not target.numel():  # there is nothing to upsample, which neither PyTorch nor the kernels know how to
        maps = [m.reshape(*m.shape[:2], *target.shape[1:]) for m in maps]
    return maps
