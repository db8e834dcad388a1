"""Cross-entropy and soft Dice of one logit map, in the two flavours that segmentation papers inherit.

p = softmax(logits),  g = one-hot(target),  e = 1e-5,  sums over pixels

"nnunet"     Dice_k = (2 sum(p g) + e) / (sum(p) + sum(g) + e)         loss = w_ce * CE - w_dice * mean_{k >= 1} Dice_k
"transunet"  Dice_k = (2 sum(p g) + e) / (sum(p^2) + sum(g^2) + e)     loss = w_ce * CE + w_dice * mean_k (1 - Dice_k)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .segmentation_sums import SMOOTH, check_maps, dice_ce, segmentation_sums, upsampled

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
    surprise = F.cross_entropy(logits, label, reduction="none")
    cross_entropy = torch.where(known, surprise, 0).sum() / known.sum().clamp(min=1)

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
    """Return weighted cross-entropy plus Dice loss."""
    check_maps(OP, [logits], target, ignore_index)
    if flavour not in FLAVOURS:
        raise ValueError(f"{OP}: expected flavour 'nnunet' or 'transunet', got {flavour!r}")
    sums = segmentation_sums([logits], target, squared=flavour == "transunet", ignore_index=ignore_index)
    return dice_ce(sums, flavour=flavour, batch_dice=batch_dice, w_ce=w_ce, w_dice=w_dice).squeeze(0)
