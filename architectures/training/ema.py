"""Moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average everything that training changes: trainable parameters and floating-point buffers, in float32.

    After n steps the average moves by 1 - min(decay, (1 + n) / (10 + n)), so that a short run is not dominated by
    where it began.

    Args:
        model: the network.
        decay: share of the old average that stays in each step of a long run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = _what_training_changes(model)
        self.shadow = {name: tensor.detach().float().clone() for name, tensor in self._live.items()}
        self._share = next(iter(self.shadow.values())).new_zeros(())  # a recorded update reads it where it lies

    def set_step(self, steps: int) -> None:
        """Say that the next update comes after ``steps`` optimiser steps."""
        self._share.fill_(1 - min(self._decay, (1 + steps) / (10 + steps)))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights."""
        for name, average in self.shadow.items():
            average.lerp_(self._live[name].float(), self._share)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Take over averages that were saved."""
        for name, average in self.shadow.items():
            average.copy_(shadow[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged weights for a while."""
        raw = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._set(self.shadow)
        try:
            yield
        finally:
            self._set(raw)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._live.items():
            tensor.copy_(values[name])


@contextmanager
def evaluation_mode(model: nn.Module, average: WeightAverage | None) -> Iterator[None]:
    """Put a network into evaluation mode, without gradients and with its averaged weights, for a while."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), nullcontext() if average is None else average.applied():
        yield
    model.train(was_training)


def _what_training_changes(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in saved.items()
        if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }
