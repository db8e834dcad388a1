"""What Dice and cross-entropy are compared with: both losses written out, MONAI's and nnU-Net's."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NNUNET_MISSING = "" if importlib.util.find_spec("nnunetv2") else "nnunetv2 is not installed"
MONAI_MISSING = "" if importlib.util.find_spec("monai") else "monai is not installed"


def dice_and_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return 0.4 Dice + 0.6 cross-entropy as people write it: softmax, one-hot truth, squared denominators."""
    p = logits.softmax(1)
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(p.dtype)
    intersection, squares = (p * truth).sum((0, 2, 3)), (p * p).sum((0, 2, 3)) + (truth * truth).sum((0, 2, 3))
    dice = (2 * intersection + 1e-5) / (squares + 1e-5)
    return 0.4 * (1 - dice).mean() + 0.6 * F.cross_entropy(logits, target)


def monai_dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Return the same loss by MONAI."""
    from monai.losses import DiceCELoss

    loss = DiceCELoss(
        to_onehot_y=True, softmax=True, batch=True, squared_pred=True, lambda_dice=0.4, lambda_ce=0.6
    )  # fmt: skip
    return loss(logits, target.unsqueeze(1))


def foreground_dice_and_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return cross-entropy minus the Dice of the foreground as nnU-Net defines it, pooled over the batch."""
    p = logits.softmax(1)
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(p.dtype)
    intersection, sizes = (p * truth).sum((0, 2, 3)), p.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    dice = (2 * intersection + 1e-5) / (sizes + 1e-5)
    return F.cross_entropy(logits, target) - dice[1:].mean()


@cache
def _nnunet_loss() -> nn.Module:
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)


def nnunet_dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Return the same loss by nnU-Net, as its trainer makes it."""
    return _nnunet_loss()(logits, target.unsqueeze(1))


compiled_foreground_loss = torch.compile(foreground_dice_and_cross_entropy, dynamic=False)
compiled_dice_and_cross_entropy = torch.compile(dice_and_cross_entropy, dynamic=False)
