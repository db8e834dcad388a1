"""Inference with a network: in evaluation mode, on its device, and with finite logits only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trifuse.kernels import NumericError


@contextmanager
def evaluating(model: nn.Module, device: torch.device | str | None = None) -> Iterator[torch.device]:
    """Move a model to a device (by default, that of its parameters); inside the context it is in evaluation mode."""
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.to(device).eval()
    try:
        yield torch.device(device)
    finally:
        model.train(was_training)


def refuse_non_finite(maps: Sequence[Tensor], slices: Sequence[int]) -> None:
    """Raise `NumericError` if a logit of (B, K, h, w) is NaN or infinite, naming the slices of those of the batch."""
    finite = torch.stack([torch.isfinite(m).flatten(1).all(dim=1) for m in maps]).all(dim=0).tolist()
    if bad := sorted({at for at, good in zip(slices, finite, strict=True) if not good}):
        raise NumericError(f"the network returned NaN or infinity for slices {bad} (counted from 0)")
