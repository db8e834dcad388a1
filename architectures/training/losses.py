"""Dice and cross-entropy as nnU-Net defines them, over the samples of all ranks.

Every loss forms sums per sample, adds them over samples and ranks (``reduce``), and only then applies its formula:

    Dice_c = (2 sum(p g) + eps) / max(sum(p) + sum(g) + eps, 1e-8)        p = softmax(logits)_c, g = one-hot(target)_c
    loss   = w_ce * mean over pixels of -log p_target  -  w_dice * mean over c >= 1 (and samples) of Dice_c

``batch_dice`` says whether the sums of Dice run over the whole batch or over each sample. All sums are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels.errors import ShapeError

from .distributed import Reduce

_SMOOTH = 1e-5
_SMALLEST_DENOMINATOR = 1e-8


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
    _check(logits, target, ignore_index)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weight = logits.new_ones(len(logits)) if sample_weight is None else sample_weight.to(logits)

    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    foreground, truth, surprise = _probabilities(logits, torch.where(valid, target, 0))
    foreground, truth = foreground * valid.unsqueeze(1), truth * valid.unsqueeze(1)

    per_class = torch.stack([part.flatten(2).sum(2) for part in (foreground * truth, foreground, truth)])  # (3, B, C)
    per_class = torch.einsum("sbc,b->sc", per_class, weight) if batch_dice else _dice(per_class).mean(1) @ weight
    cross_entropy = torch.where(valid, surprise, 0).flatten(1).sum(1) @ weight
    pixels = valid.flatten(1).sum(1).to(weight) @ weight

    sums = torch.cat([per_class.reshape(-1), torch.stack([cross_entropy, pixels, weight.sum()])])
    sums = sums if reduce is None else reduce(sums)
    dice_sums, (cross_entropy, pixels, samples) = sums[:-3], sums[-3:]
    dice = _dice(dice_sums.view(3, -1)).mean() if batch_dice else dice_sums[0] / samples
    return w_ce * cross_entropy / pixels.clamp(min=1) - w_dice * dice


def dice_nnunet(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Return minus the soft Dice of the foreground, in [-1, 0]; see `dice_ce_nnunet` for the arguments."""
    return dice_ce_nnunet(logits, target, w_ce=0.0, **options)


@dataclass(frozen=True)
class SegmentationLoss:
    """`dice_ce_nnunet` of a network's output, or of its outputs at several resolutions, for `fit`.

    A list of outputs, full resolution first, is deep supervision: output i weighs 1 / 2**i, the last one nothing, the
    weights sum to one, and the target is brought to each output's size by nearest neighbour.

    Attributes: see `dice_ce_nnunet`.

    Source: deep supervision as in nnU-Net (Isensee et al., 2021).
    """

    batch_dice: bool = True
    w_ce: float = 1.0
    w_dice: float = 1.0
    ignore_index: int | None = None

    def __call__(self, outputs: Tensor | Sequence[Tensor], batch: Mapping[str, Any], reduce: Reduce | None) -> Tensor:
        """Return the loss for ``batch["target"]``; ``batch["sample_weight"]`` may silence samples."""
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        terms = [
            share
            * dice_ce_nnunet(
                logits,
                _resize_target(batch["target"], logits.shape[2:]),
                batch_dice=self.batch_dice,
                w_ce=self.w_ce,
                w_dice=self.w_dice,
                ignore_index=self.ignore_index,
                sample_weight=batch.get("sample_weight"),
                reduce=reduce,
            )
            for share, logits in zip(deep_supervision_weights(len(outputs)), outputs, strict=True)
            if share
        ]
        return torch.stack(terms).sum()


def deep_supervision_weights(outputs: int) -> list[float]:
    """Return the weight of each output, full resolution first; a single one weighs 1."""
    raw = [0.5**index for index in range(outputs)]
    if outputs > 1:
        raw[-1] = 0.0
    return [value / sum(raw) for value in raw]


def _probabilities(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Foreground probabilities and their truth, both (B, C, ...), and -log p of the true class (B, ...)."""
    if logits.shape[1] == 1:
        truth = target.unsqueeze(1).to(logits)
        surprise = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return logits.sigmoid(), truth, surprise.squeeze(1)
    log_probabilities = logits.log_softmax(1)
    surprise = -log_probabilities.gather(1, target.unsqueeze(1)).squeeze(1)
    classes = torch.arange(1, logits.shape[1], device=logits.device).view(-1, *[1] * (target.ndim - 1))
    return log_probabilities[:, 1:].exp(), (target.unsqueeze(1) == classes).to(logits), surprise


def _dice(sums: Tensor) -> Tensor:
    """Dice from sum(p g), sum(p), sum(g), stacked in the first axis."""
    overlap, predicted, true = sums
    return (2 * overlap + _SMOOTH) / (predicted + true + _SMOOTH).clamp(min=_SMALLEST_DENOMINATOR)


def _resize_target(target: Tensor, size: torch.Size) -> Tensor:
    if target.shape[1:] == size:
        return target
    return F.interpolate(target.unsqueeze(1).float(), size=tuple(size), mode="nearest").squeeze(1).long()


def _check(logits: Tensor, target: Tensor, ignore_index: int | None) -> None:
    if logits.ndim < 3 or target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ShapeError(
            f"expected logits (B, K, H, W) and target (B, H, W), got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"expected a target of type torch.int64, got {target.dtype}")
    if not target.is_cuda and target.numel():
        classes = max(logits.shape[1], 2)
        wrong = (target < 0) | (target >= classes)
        if ignore_index is not None:
            wrong &= target != ignore_index
        if wrong.any():
            raise ValueError(
                f"expected classes 0 to {classes - 1} in the target, got {sorted(set(target[wrong].tolist()))[:5]}; "
                "map the labels, or give the one that does not count as ignore_index"
            )
