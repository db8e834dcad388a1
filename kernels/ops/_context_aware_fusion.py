"""Context-aware fusion's passes over its two maps F1 and F2: pool both, project both to one, average over channels.

Source: FIAS, equations 3 to 5. Equation 6, the gate of positions, is `spatial_gate` in `gates`.

What they save, compared with the equations computed as they are written, are whole maps:

    pooled_projection     mean(W X) = W mean(X): only the maximum needs the projected map
    recalibrated_sum      W (s * X) = (W * s) X: each sample's weights are scaled, not its maps, which stay two
    mean_projection       the mean over the channels of W1 F1 + W2 F2 is a projection by the mean rows of W1 and W2

Where a map has fewer positions than channels its weights are what is large, and it is joined and scaled as written.
With the reference backend forced, every one is computed as equations 3 to 5 are written.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import library

FUSION = "context_aware_fusion"


def pooled_projection(first: Tensor, second: Tensor, weight: Tensor | None, maximum: bool) -> Tensor:
    """Pool W X over all positions, where X is the channels of two maps (B, C, H, W), one after the other.

    Args:
        first: F1.
        second: F2.
        weight: W of shape (N, 2C, 1, 1); None leaves X as it is, N = 2C.
        maximum: whether the maxima follow the means. Of equal maxima, one gets the gradient.

    Returns:
        (B, N), or (B, 2N) with the maxima; the means are taken in float32 or wider.
    """
    compute_dtype = torch.promote_types(first.dtype, torch.float32)
    if weight is None:
        pooled = [x.mean((2, 3), dtype=compute_dtype) for x in (first, second)]
        return torch.cat(pooled + [x.flatten(2).max(2).values for x in (first, second) if maximum], dim=1)
    joined = _as_written(first)
    if joined or maximum:
        projected = _project(first, second, weight) if joined else _add_products(first, second, weight.flatten(1))
    if joined:
        means = projected.mean((2, 3), dtype=compute_dtype)
    else:
        both = torch.cat([x.mean((2, 3), dtype=compute_dtype) for x in (first, second)], dim=1)
        means = F.linear(both.to(weight.dtype), weight.flatten(1))
    return torch.cat([means, projected.flatten(2).max(2).values], dim=1) if maximum else means


def recalibrated_sum(first: Tensor, second: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Scale the channels of two maps (B, C, H, W), and project both to one: W (s * X), of shape (B, N, H, W).

    Args:
        first: F1.
        second: F2.
        weight: W of shape (N, 2C, 1, 1).
        scale: s of shape (B, 2C).
    """
    if not _as_written(first):
        return _add_products(first, second, weight.flatten(1) * scale[:, None])
    first_scale, second_scale = scale.to(first.dtype)[:, :, None, None].chunk(2, dim=1)
    return _project(first * first_scale, second * second_scale, weight)


def mean_projection(first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor) -> Tensor:
    """Average W1 F1 + W2 F2 over the channels: (B, C, H, W) twice, (N, C, 1, 1) twice -> (B, 1, H, W)."""
    if library.choose_backend(FUSION, first) == "reference":
        return (F.conv2d(first, first_weight) + F.conv2d(second, second_weight)).mean(1, keepdim=True)
    rows = [weight.flatten(1).mean(0, keepdim=True) for weight in (first_weight, second_weight)]
    return _add_products(first, second, torch.cat(rows, dim=1))


def _as_written(x: Tensor) -> bool:
    """Return whether two maps like x are joined and scaled as the equations say."""
    return library.choose_backend(FUSION, x) == "reference" or x.shape[2] * x.shape[3] < x.shape[1]


def _project(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(torch.cat([first, second], dim=1), weight)


def _add_products(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Project two maps by the halves of a weight (N, 2C), or (B, N, 2C) of one per sample, and add: (B, N, H, W).

    The result has channels innermost where the first map has.
    """
    first_weight, second_weight = weight.expand(first.shape[0], *weight.shape[-2:]).chunk(2, dim=2)
    if first.stride(1) == 1 and first.stride(3) != 1:
        first_weight, second_weight = first_weight.mT, second_weight.mT
        first, second = first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)
        total = torch.baddbmm(second.flatten(1, 2) @ second_weight, first.flatten(1, 2), first_weight)
        channels_last: Tensor = total.unflatten(1, first.shape[1:3]).permute(0, 3, 1, 2)
        return channels_last
    total = torch.baddbmm(second_weight @ second.flatten(2), first_weight, first.flatten(2))
    unflattened: Tensor = total.unflatten(2, first.shape[2:])
    return unflattened
