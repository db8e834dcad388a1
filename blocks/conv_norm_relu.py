"""Convolution, normalisation, ReLU: the unit that the decoders are built from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .image_input import check_map
from .normalization import make_norm
from .plain_layers import norm_relu


class ConvNormReLU(nn.Module):
    """Convolve without bias, normalise, rectify: (B, in_dim, H, W) -> (B, out_dim, ceil(H / stride), ceil(W / stride)).

    Args:
        in_dim: input channels.
        out_dim: output channels.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.
        kernel_size: side of the kernel, odd.
        stride: of the convolution; sides that it does not divide are rounded up.
        groups: parts that the channels are convolved in, each on its own; divides both numbers of channels.

    Raises:
        ValueError: an unknown norm.
    """

    def __init__(
        self, in_dim: int, out_dim: int, norm: str = "batch", kernel_size: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.norm = make_norm(norm, out_dim)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from He's normal distribution over the fan-out."""
        init_convs(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit to a map.

        Raises:
            ShapeError: x is not (B, in_dim, H, W).
        """
        check_map("ConvNormReLU", "x", x, self.in_dim)
        return norm_relu(self.norm, self.conv(x))


def init_convs(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise all convolutions and projections in ``module``: He's normal distribution over the fan-out, bias 0.

    Source: He et al., Delving Deep into Rectifiers, Eq. 14.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
