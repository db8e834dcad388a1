"""The score by which the best epoch is chosen: Dice over the validation slices, case by case."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .batches import on_device
from .step import Forward, forward_image


class SliceValidation:
    """Score a network on a data set of slices, or of patches that cover them, at the size it is trained at.

    The counts of all slices of a case are added before its Dice is formed, so that the score is the volume's. A class
    that is neither there nor predicted in a case does not count.

    Args:
        dataset: samples with ``image``, ``target`` (S, S) and ``case_id``; pixels whose target is negative do not
            count.
        class_names: names of the classes, the background first.
        batch_size: slices at a time.
        forward: computes the outputs from a batch.
    """

    def __init__(
        self, dataset: Any, class_names: tuple[str, ...], batch_size: int, forward: Forward = forward_image
    ) -> None:
        self.loader = DataLoader(dataset, batch_size=batch_size)
        self.class_names = class_names
        self.forward = forward

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return ``dice``, the mean over cases and classes, and ``dice_<class>`` where there are several."""
        device = next(model.parameters()).device
        classes = len(self.class_names)
        counts: dict[str, torch.Tensor] = {}
        for batch in self.loader:
            batch = on_device(batch, device)
            logits = self.forward(model, batch)
            predicted = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
            for case_id, mine, true in zip(batch["case_id"], predicted, batch["target"], strict=True):
                pairs = torch.bincount((true * classes + mine)[true >= 0], minlength=classes**2)
                counts[case_id] = counts.get(case_id, 0) + pairs.view(classes, classes).double().cpu()
        tables = torch.stack(list(counts.values()))
        both = tables.diagonal(dim1=1, dim2=2)
        dice = (2 * both / (tables.sum(1) + tables.sum(2)))[:, 1:]
        scores = {"dice": dice.nanmean().item()}
        if classes > 2:
            scores |= {f"dice_{n}": d.item() for n, d in zip(self.class_names[1:], dice.nanmean(0), strict=True)}
        return scores
