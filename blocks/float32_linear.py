"""Linear layers on a few numbers per sample, computed in float32 or wider whatever the network around them runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels.library import autocast_available


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which autocast, where a device has it, leaves types as they are."""
    return torch.autocast(device_type, enabled=False) if autocast_available(device_type) else nullcontext()


class Float32Linear(nn.Linear):
    """A linear layer computed in float32, or in float64 if its weight is: under autocast, and with half weights, too.

    For a few numbers per sample float32 costs nothing, and the result scales a whole map.
    """

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(input.device.type):
            return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weight and bias as `torch.nn.Linear` does: evenly, within 1 / sqrt(inputs) of zero."""
        bound = self.in_features**-0.5
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)


class ZeroInitLinear(Float32Linear):
    """A `Float32Linear` whose weight and bias start as zero."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set weight and bias to zero; nothing is drawn from the generator."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroInitMlp(nn.Module):
    """Linear, rectifier, Linear in float32 or wider: (B, in_dim) -> (B, out_dim); the second layer starts as zero.

    Args:
        in_dim: numbers per sample that come in.
        hidden: numbers between the two layers.
        out_dim: numbers that come out.
        slope: of the rectifier below zero; 0 is a ReLU.
    """

    def __init__(self, in_dim: int, hidden: int, out_dim: int, slope: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.slope = Float32Linear(in_dim, hidden), ZeroInitLinear(hidden, out_dim), slope
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the first layer's weights as `torch.nn.Linear` does, and set the second layer to zero."""
        self.first.reset_parameters(generator)
        self.second.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers."""
        out: Tensor = self.second(F.leaky_relu(self.first(x), self.slope))
        return out


class TimeApartGate(nn.Module):
    """Two `ZeroInitMlp` whose results are added, one for the last number, a time, and one for all others.

    (B, in_dim) -> (B, out_dim). Among a hundred other numbers a single one hardly moves a network, least of all while
    its weights are few steps old.

    Args: see `ZeroInitMlp`.
    """

    def __init__(self, in_dim: int, hidden: int, out_dim: int, slope: float = 0.0) -> None:
        super().__init__()
        self.others = ZeroInitMlp(in_dim - 1, hidden, out_dim, slope)
        self.time = ZeroInitMlp(1, hidden, out_dim, slope)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both as `ZeroInitMlp` does."""
        self.others.reset_parameters(generator)
        self.time.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both, and add what they give."""
        out: Tensor = self.others(x[:, :-1]) + self.time(x[:, -1:])
        return out
