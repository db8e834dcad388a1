"""A stand-in for the few modules of nnU-Net v2 that a trainer with another loss touches.

Written from what nnU-Net's trainers promise: ``_build_loss`` returns a loss of logits (B, K, ...) and labels
(B, 1, ...), wrapped, under deep supervision, by what applies it to every output with a weight.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F


class WrittenOut(nn.Module):
    """Cross-entropy minus the soft Dice of the foreground, of voxels whose label is not ignored."""

    def __init__(self, batch_dice, ignore_label):
        super().__init__()
        self.batch_dice, self.ignore_label = batch_dice, ignore_label

    def forward(self, logits, labels):
        known = torch.ones_like(labels, dtype=torch.bool) if self.ignore_label is None else labels != self.ignore_label
        labels = torch.where(known, labels, 0).long()
        truth = torch.zeros_like(logits).scatter(1, labels, 1) * known
        probabilities = logits.softmax(1) * known
        axes = (*([0] if self.batch_dice else []), *range(2, logits.ndim))
        sizes = (probabilities + truth).sum(axes)
        dice = (2 * (probabilities * truth).sum(axes) + 1e-5) / (sizes + 1e-5)
        entropy = F.cross_entropy(logits, labels[:, 0], reduction="none")[:, None]
        return (entropy * known).sum() / known.sum() - dice[..., 1:].mean()


class OfEveryOutput(nn.Module):
    """The weighted sum of a loss over outputs and their labels."""

    def __init__(self, loss, weights):
        super().__init__()
        self.loss, self.weights = loss, weights

    def forward(self, outputs, labels):
        return sum(w * self.loss(*both) for w, *both in zip(self.weights, outputs, labels, strict=True) if w)


class Trainer:
    """Builds the loss from attributes that nnU-Net's trainer reads from plans and data set."""

    def _build_loss(self):
        if self.label_manager.has_regions:
            return nn.BCEWithLogitsLoss()
        loss = WrittenOut(self.configuration_manager.batch_dice, self.label_manager.ignore_label)
        if not self.enable_deep_supervision:
            return loss
        count = len(self.configuration_manager.pool_op_kernel_sizes) - 1
        weights = [*(0.5**i for i in range(count - 1)), 0.0]
        return OfEveryOutput(loss, [weight / sum(weights) for weight in weights])


class MemoryEfficientSoftDiceLoss:
    """The name by which the compound loss is told which Dice to take."""


def DC_and_CE_loss(soft_dice_kwargs, ce_kwargs, dice_class):
    """Build the compound loss as nnU-Net's trainer does, for one process and labels that are all known."""
    assert dice_class is MemoryEfficientSoftDiceLoss
    assert (soft_dice_kwargs.pop("smooth"), soft_dice_kwargs.pop("do_bg"), soft_dice_kwargs.pop("ddp")) == (1e-5, 0, 0)
    return WrittenOut(**soft_dice_kwargs, ignore_label=None)


PLACES = {
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer": {"nnUNetTrainer": Trainer},
    "nnunetv2.training.loss.compound_losses": {"DC_and_CE_loss": DC_and_CE_loss},
    "nnunetv2.training.loss.dice": {"MemoryEfficientSoftDiceLoss": MemoryEfficientSoftDiceLoss},
}


def install(monkeypatch):
    """Let these modules of nnU-Net be imported, as long as a test runs."""
    for name, members in PLACES.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
        vars(sys.modules[name]).update(members)
