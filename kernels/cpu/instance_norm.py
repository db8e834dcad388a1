"""Instance normalisation and its gradients on a CPU, by whichever of PyTorch's normalisations is fastest and exact.

Of maps in planes that is a group normalisation by groups of one channel. Of maps with their channels innermost it is a
batch normalisation of one sample after the other: the group normalisation has no vectorised gradient there, and takes
its variance from the mean of squares, which cancels where the mean is large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# Maps of fewer are normalised in planes all the same: that takes fewer steps.
FEWEST_ELEMENTS = 1 << 16


def instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps x (B, C, H, W), normalised, scaled and shifted; the means (B, C), and the reciprocal deviations."""
    if _by_sample(x):
        each = [torch.native_batch_norm(sample, weight, bias, None, None, True, 0.0, eps) for sample in x.split(1)]
        maps, *statistics = zip(*each, strict=True)
        return torch.cat(maps), torch.stack(statistics[0]), torch.stack(statistics[1])
    batch, channels, height, width = x.shape
    sizes = (batch, channels, height * width, channels)
    out, means, rstds = torch.native_group_norm(x.contiguous(), weight, bias, *sizes, eps)
    return out.contiguous(memory_format=_layout(x)), means, rstds


def instance_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, means: Tensor, rstds: Tensor, needed: Sequence[bool]
) -> Gradients:
    """Return the gradients of x, weight and bias that are needed; the others are None."""
    needed = list(needed)
    if _by_sample(x):
        samples = zip(*(value.split(1) for value in (grad, x)), means, rstds, strict=True)
        backward = torch.ops.aten.native_batch_norm_backward
        each = [backward(g, s, weight, None, None, mean, rstd, True, 0.0, needed) for g, s, mean, rstd in samples]
        of_x, of_weight, of_bias = zip(*each, strict=True)
        return (
            torch.cat(of_x) if needed[0] else None,
            torch.stack(of_weight).sum(0) if needed[1] else None,
            torch.stack(of_bias).sum(0) if needed[2] else None,
        )
    batch, channels, height, width = x.shape
    sizes = (batch, channels, height * width, channels)
    backward = torch.ops.aten.native_group_norm_backward
    of_map, of_scale, of_shift = backward(grad.contiguous(), x.contiguous(), means, rstds, weight, *sizes, needed)
    return of_map.contiguous(memory_format=_layout(x)) if needed[0] else None, of_scale, of_shift


def _by_sample(x: Tensor) -> bool:
    return x.numel() >= FEWEST_ELEMENTS and _layout(x) == torch.channels_last


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
