"""Layers whose weights a fused path reads instead of calling them, and what happens once one is more than its weights.

An adapter, a pruning, a weight norm, a quantisation or a hook acts where a layer is called. A block therefore asks
`is_plain` before it reads a weight, and calls the layer, as its equations are written, where the answer is no.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import instance_norm_leaky_relu
from trifuse.kernels.torch_internals import has_hooks

from .normalization import InstanceNorm

PLAIN = (nn.Conv2d, nn.Linear, InstanceNorm)


def is_plain(*layers: nn.Module) -> bool:
    """Return whether calling each layer gives what it is named for, by ``weight`` and ``bias``, and no more.

    Not of other classes, subclasses and parametrized layers included, and not with hooks, a forward of the instance's
    own, or a weight that computes in its own way, as a quantised one does.
    """
    for layer in layers:
        if type(layer) not in PLAIN or has_hooks(layer):
            return False
        if "forward" in layer.__dict__ or hasattr(layer.weight, "__tensor_flatten__"):
            return False
    return True


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to the last axis of vectors (B, C) or of maps (B, H, W, C)."""
    if is_plain(layer):
        return F.linear(x, layer.weight.flatten(1), layer.bias)  # type: ignore[operator,arg-type]
    if x.ndim == 2:
        return layer(x[:, :, None, None]).flatten(1)
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def norm_leaky_relu(norm: nn.Module, x: Tensor, negative_slope: float) -> Tensor:
    """Normalise maps (B, C, H, W) by an `InstanceNorm`, and rectify them, both at once."""
    if not is_plain(norm):
        return F.leaky_relu(norm(x), negative_slope)
    weight, bias = norm.weight, norm.bias
    return instance_norm_leaky_relu(x, weight, bias, eps=norm.eps, negative_slope=negative_slope)  # type: ignore[arg-type]


def dtype_of(layer: nn.Module) -> torch.dtype:
    """Return the type that a layer computes in: that of its weights, float32 for one without floating-point weights."""
    if is_plain(layer):
        return layer.weight.dtype  # type: ignore[return-value]
    return next((weight.dtype for weight in layer.parameters() if weight.is_floating_point()), torch.float32)
