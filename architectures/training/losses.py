"""Dice and cross-entropy over the samples of all ranks: nnU-Net's loss, and FIAS' over all subsets of its outputs.

Every loss forms sums per sample, adds them over samples and ranks (``reduce``), and only then applies its formula, so
that it does not depend on how many ranks share a batch. The sums, the only heavy part, are one fused operator, and with
one rank so is all of the loss: `trifuse.kernels.ops._segmentation_loss`, and of outputs at several resolutions
`trifuse.kernels.ops._deep_supervision_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels.ops._deep_supervision_loss import deep_supervision_loss
from trifuse.kernels.ops._segmentation_loss import segmentation_loss
from trifuse.kernels.ops._segmentation_sums import check_target
from trifuse.kernels.ops.mutation_loss import mutation_loss_of_ranks

from .distributed import Reduce, across_ranks


def dice_ce_nnunet(
    logits: Tensor,
    target: Tensor,
    *,
    batch_dice: bool = True,
    w_ce: float = 1.0,
    w_dice: float = 1.0,
    ignore_index: int | None = None,
    sample_weight: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Return weighted cross-entropy minus weighted soft Dice of the foreground, a scalar in float32 or wider.

    Args:
        logits: of shape (B, K, H, W), or with any number of spatial axes. One class, K = 1, means a sigmoid: binary
            cross-entropy, and that class is the foreground.
        target: class of every pixel, int64 of shape (B, H, W).
        batch_dice: pool the sums of Dice over the batch, instead of averaging the Dice of each sample.
        w_ce: weight of the cross-entropy.
        w_dice: weight of the Dice.
        ignore_index: a class of the target whose pixels count for nothing.
        sample_weight: of shape (B,); 0 makes a sample count for nothing.
        reduce: sums over all ranks; None for one rank.

    Raises:
        ShapeError: logits and target do not belong together.
        ValueError: a class outside [0, K), on a CPU; a GPU is not made to wait for that check.

    Source: Isensee et al., nnU-Net, Nature Methods 2021; Drozdzal et al., arXiv 1608.04117, for the Dice.
    """
    logits, target = _as_maps(logits, target, ignore_index)
    loss = segmentation_loss(
        [logits],
        target,
        flavour="nnunet",
        batch_dice=batch_dice,
        w_ce=w_ce,
        w_dice=w_dice,
        ignore_index=ignore_index,
        sample_weight=sample_weight,
        reduce=across_ranks(reduce),
    )
    return loss.squeeze(0)


def dice_nnunet(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Return minus the soft Dice of the foreground, in [-1, 0]; see `dice_ce_nnunet` for the arguments."""
    return dice_ce_nnunet(logits, target, w_ce=0.0, **options)


@dataclass(frozen=True)
class SegmentationLoss:
    """`dice_ce_nnunet` of a network's output, or of its outputs at several resolutions, for `fit`.

    A list of outputs, full resolution first, is deep supervision: output i weighs 1 / 2**i, the last one nothing, the
    weights sum to one, and the target is brought to each output's size by nearest neighbour.

    Attributes: see `dice_ce_nnunet`.

    Raises:
        ValueError: a negative weight, or none that is positive.

    Source: deep supervision as in nnU-Net (Isensee et al., 2021).
    """

    batch_dice: bool = True
    w_ce: float = 1.0
    w_dice: float = 1.0
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        check_weights(w_dice=self.w_dice, w_ce=self.w_ce)

    @property
    def words(self) -> str:
        """What it is, for a report."""
        pooled = "pooled over the batch" if self.batch_dice else "of each sample"
        return f"{self.w_dice:g} Dice ({pooled}) + {self.w_ce:g} cross-entropy, at all resolutions but the coarsest"

    def __call__(self, outputs: Tensor | Sequence[Tensor], batch: Mapping[str, Any], reduce: Reduce | None) -> Tensor:
        """Return the loss for ``batch["target"]``; ``batch["sample_weight"]`` may silence samples."""
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        weights = deep_supervision_weights(len(outputs))
        levels = [logits for logits, weight in zip(outputs, weights, strict=True) if weight]
        targets = [_resize_target(batch["target"], logits.shape[2:]) for logits in levels]
        pairs = [_as_maps(*pair, self.ignore_index) for pair in zip(levels, targets, strict=True)]
        return deep_supervision_loss(
            [logits for logits, _ in pairs],
            [target for _, target in pairs],
            [weight for weight in weights if weight],
            batch_dice=self.batch_dice,
            w_ce=self.w_ce,
            w_dice=self.w_dice,
            ignore_index=self.ignore_index,
            sample_weight=batch.get("sample_weight"),
            reduce=across_ranks(reduce),
        )


@dataclass(frozen=True)
class MutationLoss:
    """`trifuse.kernels.ops.mutation_loss` of a network's outputs over the samples of all ranks, for `fit`.

    The outputs may be coarser than the target; they are upsampled inside the loss.

    Attributes: see `trifuse.kernels.ops.mutation_loss`.
    """

    gamma: float = 0.4
    subsets: str = "mutation"
    reduction: str = "sum"
    ignore_index: int | None = None

    def __call__(self, outputs: Tensor | Sequence[Tensor], batch: Mapping[str, Any], reduce: Reduce | None) -> Tensor:
        """Return the loss for ``batch["target"]``; ``batch["sample_weight"]`` may silence samples."""
        return mutation_loss_of_ranks(
            [outputs] if isinstance(outputs, Tensor) else outputs,
            batch["target"],
            gamma=self.gamma,
            subsets=self.subsets,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            sample_weight=batch.get("sample_weight"),
            reduce=across_ranks(reduce),
        )


def check_weights(**weights: float) -> None:
    """Check the weights of a loss's terms, given by name.

    Raises:
        ValueError: one is negative or not finite, or all are zero.
    """
    for name, weight in weights.items():
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number, and not negative, got {weight}")
    if not any(weights.values()):
        raise ValueError(f"{' and '.join(weights)} must not all be 0: there would be nothing to learn from")


def deep_supervision_weights(outputs: int) -> list[float]:
    """Return the weight of each output, full resolution first; a single one weighs 1."""
    raw = [0.5**index for index in range(outputs)]
    if outputs > 1:
        raw[-1] = 0.0
    return [value / sum(raw) for value in raw]


def _as_maps(logits: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Check logits and target, and return them with two spatial axes: which one a pixel lies on does not matter."""
    check_target("dice_ce_nnunet", logits, target, ignore_index)
    if logits.ndim != 4:
        logits, target = logits.unsqueeze(2).flatten(2, -2), target.unsqueeze(1).flatten(1, -2)
    return logits, target


def _resize_target(target: Tensor, size: torch.Size) -> Tensor:
    """Bring a target to a size by nearest neighbour; a view of it where the size divides its own."""
    if target.shape[1:] == size:
        return target
    sides = list(zip(target.shape[1:], size, strict=True))
    if all(small and not large % small for large, small in sides):
        return target[(slice(None), *(slice(None, None, large // small) for large, small in sides))]
    return F.interpolate(target.unsqueeze(1).float(), size=tuple(size), mode="nearest").squeeze(1).long()
