"""The normalisations that a convolutional block may choose from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import batch_norm_activation
from trifuse.kernels.choices import check_choice
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.scalars import check_number
from trifuse.kernels.torch_internals import inside_backward

Norm = Literal["batch", "instance", "group"]
_MOST_GROUPS = 8
_LEAST_CHANNELS_PER_GROUP = 4


class BatchNorm(nn.BatchNorm2d):
    """Normalise each channel over batch and space; a single value per channel is refused with a remedy."""

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        return super().forward(input)

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """Return what an activation, ``"relu"`` or ``"gelu"``, makes of the result of `forward`, both at once."""
        self._check(x)
        remembers = self.training and self.track_running_stats
        share = 0.0 if self.momentum is None else self.momentum
        if remembers and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # every batch so far weighs alike
                share = 1.0 / float(self.num_batches_tracked)
        running = (self.running_mean, self.running_var) if remembers or not self.training else (None, None)
        return batch_norm_activation(
            x, *running, self.weight, self.bias,
            training=self.training, momentum=share, eps=self.eps, activation=activation,
        )  # fmt: skip

    def _check(self, x: Tensor) -> None:
        if self.training and x.numel() == x.shape[1]:
            raise ShapeError(
                f"batch normalisation in training needs more than one value per channel, got shape "
                f"{tuple(x.shape)}; use a larger batch or image, or norm='group'"
            )


class BatchNormOfPresent(nn.BatchNorm2d):
    """Normalise each channel over batch and space, where a part of the batch may be absent.

    In training, samples that are absent count in no statistics; they come out as zero and get no gradient. The present
    ones come out as if the batch held them alone, whatever their number, which is not read from the device. Where none
    is present, the running statistics stay as they are.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None

    def forward(self, input: Tensor, present: Tensor | None = None) -> Tensor:
        """Normalise (B, C, H, W); ``present``, bool of shape (B,), says which samples are there, None that all are."""
        if present is None or not self.training:
            return super().forward(input)
        there = present[:, None, None, None]
        x = torch.where(there, input.to(torch.promote_types(input.dtype, torch.float32)), 0.0)
        values = (present.sum() * (input.shape[2] * input.shape[3])).to(x.dtype)
        mean = x.sum((0, 2, 3), keepdim=True) / values.clamp(min=1)
        centred = torch.where(there, x - mean, 0.0)
        variance = centred.square().sum((0, 2, 3), keepdim=True) / values.clamp(min=1)
        unbiased = variance.detach() * values / (values - 1).clamp(min=1)
        self._remember(mean.detach().flatten(), unbiased.flatten(), present.any())
        scale = self.weight.to(x.dtype)[:, None, None] * torch.rsqrt(variance + self.eps)
        shifted = torch.where(there, centred * scale + self.bias.to(x.dtype)[:, None, None], 0.0)
        return shifted.to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor, anybody: Tensor) -> None:
        alike = 1 / (self.num_batches_tracked + 1)  # every batch so far weighs as much, as without a momentum
        share = anybody * (alike if self.momentum is None else self.momentum)
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(value.to(running.dtype), share.to(running.dtype))
        self.num_batches_tracked.add_(anybody)


class RunningNorm(nn.Module):
    """Normalise vectors by what they were over the images of training: (B, N) -> (B, N).

    Each number loses its mean over images and is divided by its deviation over images and by the root of N, which makes
    vectors of about length one. What is the same for every image is gone, so that a layer behind it sees what differs.
    Both are running statistics, in training too, where they take in the batch first: batches may be as small as one
    image. No gradient flows through them.

    Args:
        dim: numbers N of a vector.
        momentum: least share that a batch has in the statistics; the n-th one has 1/n until then.
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, dim: int, momentum: float = 0.05, eps: float = 1e-5) -> None:
        super().__init__()
        check_number("RunningNorm: momentum", momentum)
        self.dim, self.momentum, self.eps = dim, momentum, eps
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forget all images."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not inside_backward():  # where activation checkpointing repeats a pass
            self._take_in(x.detach())
        scale = torch.rsqrt(self.running_var + self.eps) * self.dim**-0.5
        normalised: Tensor = (x - self.running_mean) * scale
        return normalised

    @torch.no_grad()
    def _take_in(self, x: Tensor) -> None:
        self.num_batches_tracked += 1
        share = (1 / self.num_batches_tracked).clamp(min=self.momentum)
        x = x.to(self.running_mean.dtype)
        before = self.running_mean.clone()
        self.running_mean.lerp_(x.mean(0), share.to(x.dtype))
        spread = ((x - before) * (x - self.running_mean)).mean(0)  # as Welford's: never negative
        self.running_var.lerp_(spread, share.to(x.dtype))


class InstanceNorm(nn.InstanceNorm2d):
    """Normalise each channel of each sample over space, with learned scale and shift."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=True)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2] * input.shape[3] == 1:
            raise ShapeError(
                f"instance normalisation needs more than one value per channel and sample, got shape "
                f"{tuple(input.shape)}; use a larger image, or norm='group'"
            )
        # groups of one channel are the same arithmetic; PyTorch's own form copies scale and shift for each sample
        return F.group_norm(input, self.num_features, self.weight, self.bias, self.eps)


def make_norm(kind: str, dim: int) -> nn.Module:
    """Return the normalisation of (B, dim, H, W) maps called ``kind``: ``"batch"``, ``"instance"`` or ``"group"``.

    There are eight groups, or half as many until they divide ``dim`` and hold at least four channels each. All norms
    start as scale 1 and shift 0.

    Raises:
        ValueError: an unknown kind.
    """
    check_choice("norm", kind, Norm)
    if kind == "batch":
        return BatchNorm(dim)
    if kind == "instance":
        return InstanceNorm(dim)
    return nn.GroupNorm(_groups(dim), dim)


def _groups(dim: int) -> int:
    groups = _MOST_GROUPS
    while groups > 1 and (dim % groups or dim // groups < _LEAST_CHANNELS_PER_GROUP):
        groups //= 2
    return groups
