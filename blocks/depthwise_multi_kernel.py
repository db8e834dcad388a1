"""The depthwise multi-kernel unit: neighbourhoods of several sizes at once, channel by channel."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from trifuse.kernels import depthwise_multi_kernel
from trifuse.kernels.choices import check_choice

from .conv_norm_relu import ConvNormReLU, init_convs
from .image_input import check_map
from .plain_layers import is_plain

KsGroups = Literal["dense", "depthwise"]


class DepthwiseMultiKernel(nn.Module):
    """Reduce the map, convolve it with depthwise kernels of several sizes, and mix the channels.

    ``L = ConvNormReLU3x3(X)``, ``Z_m = DWConv_k(m)(L)``, ``F = ConvNormReLU1x1(L + sum_m Z_m)``:
    (B, in_dim, H, W) -> (B, dim, H / stride, W / stride), sides rounded up; maps may be smaller than the kernels.

    Args:
        in_dim: input channels.
        dim: output channels.
        stride: of the first convolution.
        kernels: sides of the depthwise kernels, odd. They have neither bias nor norm.
        ks_groups: ``"dense"``: the first convolution mixes all channels; ``"depthwise"``: each output channel reads
            one input channel, so that ``in_dim`` must divide ``dim``.
        depth: how many such units follow one another; all but the first keep size and channels.
        norm: ``"batch"``, ``"instance"`` or ``"group"``.

    Raises:
        ValueError: unknown ``ks_groups`` or norm, no step, no unit, no kernel or one without a centre, or, with
            ``"depthwise"``, numbers of channels that do not divide.

    Source: FIAS, the depthwise multi-kernel encoder; its equations and rule of kernels are those of PKINet's inception
    block (Cai et al., Poly Kernel Inception Network).
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int = 2,
        kernels: Sequence[int] = (5, 7),
        ks_groups: str = "dense",
        depth: int = 1,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        _check(in_dim, dim, stride, kernels, ks_groups, depth)
        self.in_dim = in_dim
        dims = [in_dim] + [dim] * depth
        strides = [stride] + [1] * (depth - 1)
        self.units = nn.Sequential(
            *(
                _unit(dims[i], dim, strides[i], kernels, dims[i] if ks_groups == "depthwise" else 1, norm)
                for i in range(depth)
            )
        )
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights from He's normal distribution over the fan-out."""
        init_convs(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        check_map("DepthwiseMultiKernel", "x", x, self.in_dim)
        out: Tensor = self.units(x)
        return out


class ParallelKernels(nn.Module):
    """Add to a map (B, C, H, W) its convolutions with depthwise kernels of several sizes, without bias.

    Attributes:
        convs: they hold the weights; their convolutions are computed together while all are plain, see `is_plain`.
    """

    def __init__(self, dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, bias=False) for k in kernels)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(*self.convs):
            return depthwise_multi_kernel(x, [cast(nn.Conv2d, conv).weight for conv in self.convs])
        fused: Tensor = x + sum(conv(x) for conv in self.convs)
        return fused


def _unit(in_dim: int, dim: int, stride: int, kernels: Sequence[int], groups: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            reduce=ConvNormReLU(in_dim, dim, norm, stride=stride, groups=groups),
            depthwise=ParallelKernels(dim, kernels),
            project=ConvNormReLU(dim, dim, norm, kernel_size=1),
        )
    )


def _check(in_dim: int, dim: int, stride: int, kernels: Sequence[int], ks_groups: str, depth: int) -> None:
    check_choice("DepthwiseMultiKernel: ks_groups", ks_groups, KsGroups)
    if ks_groups == "depthwise" and dim % in_dim:
        raise ValueError(f"DepthwiseMultiKernel: with ks_groups='depthwise', in_dim {in_dim} must divide dim {dim}")
    if not kernels or any(k < 1 or k % 2 == 0 for k in kernels):
        raise ValueError(f"DepthwiseMultiKernel: kernels must be odd numbers, at least one, got {tuple(kernels)}")
    for name, number in (("stride", stride), ("depth", depth)):
        if number < 1:
            raise ValueError(f"DepthwiseMultiKernel: {name} must be at least 1, got {number}")
