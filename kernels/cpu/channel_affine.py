"""An affine map per sample and channel, on a CPU: a * x + b, and its gradients, in one pass over a map in planes.

A batch normalisation by fixed statistics, mean 0 and variance 1, is this very map, with a and b as its weight and bias,
and every channel of every sample a channel of its own. PyTorch has it vectorised, with all three gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .channel_sums import channel_sums


def channel_affine(features: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``a * features + b``, for features (B, C, H, W) and a and b (B, C), in the type of features."""
    if not _in_planes(features):
        wide = features.to(a.dtype)
        out = torch.addcmul(b[:, :, None, None], wide, a[:, :, None, None], out=torch.empty_like(wide))
        return out.to(features.dtype)
    mean, variance = torch.zeros(a.numel(), dtype=a.dtype), torch.ones(a.numel(), dtype=a.dtype)
    weight, bias = a.reshape(-1), b.reshape(-1)
    out, *_ = torch.native_batch_norm(_as_channels(features), weight, bias, mean, variance, False, 0.0, 0.0)
    return out.view(features.shape)


def channel_affine_gradients(
    grad: Tensor, features: Tensor, a: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of features, a and b that are needed.

    Args:
        grad: gradient of the result, of any layout.
        features: the map; where the gradient of a is not needed, any map of its shape, such as grad.
        a: (B, C), in the type that sums are made in.
        needed: which of the three are needed.
    """
    needs_features, needs_a, needs_b = needed
    if _in_planes(features):
        mean, variance = torch.zeros(a.numel(), dtype=a.dtype), torch.ones(a.numel(), dtype=a.dtype)
        maps, unused = (_as_channels(grad.contiguous()), _as_channels(features)), torch.empty(0, dtype=a.dtype)
        backward = torch.ops.aten.native_batch_norm_backward
        of_x, of_a, of_b = backward(*maps, a.reshape(-1), mean, variance, unused, unused, False, 0.0, needed)
        features_grad = of_x.view(grad.shape) if needs_features else None
        return features_grad, of_a.view(a.shape) if needs_a else None, of_b.view(a.shape) if needs_b else None
    features_grad = (grad.to(a.dtype) * a[:, :, None, None]).to(grad.dtype) if needs_features else None
    of_a, of_b = channel_sums(grad, features, a.dtype) if needs_a or needs_b else (None, None)
    return features_grad, of_a if needs_a else None, of_b if needs_b else None


def _as_channels(x: Tensor) -> Tensor:
    """View maps in planes as one sample of B * C channels."""
    return x.view(1, -1, *x.shape[2:])


def _in_planes(x: Tensor) -> bool:
    return x.is_contiguous() and x.numel() > 0
