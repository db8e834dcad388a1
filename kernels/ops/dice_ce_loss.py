"""Cross-entropy and soft Dice of one logit map, in the two flavours that segmentation papers inherit.

    "nnunet"      Dice_k = (2 sum(p g) + e) / (sum(p) + sum(g) + e)          foreground classes k >= 1
                  loss   = w_ce * CE - w_dice * mean_k Dice_k
    "transunet"   Dice_k = (2 sum(p g) + e) / (sum(p**2) + sum(g**2) + e)    all K classes
                  loss   = w_ce * CE + w_dice * mean_k (1 - Dice_k)

with p = softmax(logits), g = one-hot(target), e = 1e-5, CE the mean of -log p_target, and all sums over pixels.

    d Dice_k / d p_k = (2 g - Dice_k * (1 or 2 p_k)) / (the denominator), and through the softmax as usual

Sources: Isensee et al., nnU-Net, Nature Methods 2021; Chen et al., TransUNet, arXiv 2102.04306.

What fusing saves: softmax, one-hot truth, their products and the cross-entropy each write maps of the logits' size, and
autograd keeps four of them. Here each pass reads the logits once; the logits, the target and O(K) sums are all that is
kept. Logits coarser than the target are upsampled inside, and never exist at full size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels.choices import check_choice
from trifuse.kernels.library import forced_backend

from ._segmentation_loss import segmentation_loss
from ._segmentation_sums import SMOOTH, check_maps
from ._segmentation_sums_composed import upsampled

OP = "dice_ce_loss"
FLAVOURS = ("nnunet", "transunet")


def dice_ce_loss_reference(
    logits: Tensor,
    target: Tensor,
    *,
    flavour: str = "nnunet",
    batch_dice: bool = True,
    w_ce: float = 1.0,
    w_dice: float = 1.0,
    ignore_index: int | None = None,
) -> Tensor:
    """Define `dice_ce_loss`: probabilities and one-hot truth in full, then the two formulas."""
    logits = upsampled(logits, target.shape[1:])
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    known = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    label = torch.where(known, target, 0)
    nll = F.cross_entropy(logits, label, reduction="none")
    cross_entropy = torch.where(known, nll, 0).sum() / known.sum().clamp(min=1)

    p = logits.softmax(1) * known.unsqueeze(1)
    g = F.one_hot(label, logits.shape[1]).movedim(-1, 1) * known.unsqueeze(1)
    pixels = (0, 2, 3) if batch_dice else (2, 3)
    if flavour == "transunet":
        dice = (2 * (p * g).sum(pixels) + SMOOTH) / ((p * p).sum(pixels) + (g * g).sum(pixels) + SMOOTH)
        return w_ce * cross_entropy + w_dice * (1 - dice).mean()
    dice = (2 * (p * g).sum(pixels) + SMOOTH) / (p.sum(pixels) + g.sum(pixels) + SMOOTH)
    return w_ce * cross_entropy - w_dice * dice[..., 1:].mean()


def dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    flavour: str = "nnunet",
    batch_dice: bool = True,
    w_ce: float = 1.0,
    w_dice: float = 1.0,
    ignore_index: int | None = None,
) -> Tensor:
    """Return weighted cross-entropy plus weighted Dice loss, a scalar.

    Sums are taken in float32 (float64 for float64). Deterministic on every backend; can be differentiated once.

    Args:
        logits: (B, K, h, w), at the target's size, or coarser: then they are upsampled bilinearly (align_corners=False)
            inside. K = 1 means a sigmoid: two classes with logits 0 and x.
        target: class of every pixel, int64 of shape (B, H, W).
        flavour: "nnunet" or "transunet"; see the module's docstring.
        batch_dice: pool the sums of Dice over the batch, instead of averaging the Dice of each sample.
        w_ce: weight of the cross-entropy.
        w_dice: weight of the Dice.
        ignore_index: a class of the target whose pixels count for nothing.

    Returns:
        Scalar in float32, float64 for float64 logits. NaN for a target outside [0, K) where the target is not on a CPU:
        a GPU is not made to wait for that check. NaN for a NaN logit, at an ignored pixel too, and for an infinite
        logit of a map that is upsampled: there, rule a class out by a large negative number.
        Where every pixel is ignored, or a batch is empty, there is nothing to get wrong: the cross-entropy is 0 and
        every Dice is e / e = 1, which makes -w_dice ("nnunet") or 0 ("transunet"), the least that is possible, and
        gradients of 0. But without ``batch_dice`` an empty batch has no Dice to average: 0 ("nnunet") or w_dice.

    Raises:
        ShapeError: logits and target do not belong together.
        TypeError: logits that are not floating point, or a target that is not int64.
        ValueError: an unknown flavour, or on a CPU a class outside [0, K).

    Examples:
        >>> loss = dice_ce_loss(torch.randn(2, 9, 64, 64), torch.zeros(2, 256, 256, dtype=torch.int64))

    Source: see the module's docstring.
    """
    check_maps(OP, [logits], target, ignore_index)
    check_choice(f"{OP}: flavour", flavour, FLAVOURS)
    options: dict[str, Any] = {"flavour": flavour, "batch_dice": batch_dice, "w_ce": w_ce, "w_dice": w_dice}
    if forced_backend() == "reference":
        return dice_ce_loss_reference(logits, target, ignore_index=ignore_index, **options)
    return segmentation_loss([logits], target, ignore_index=ignore_index, **options).squeeze(0)
