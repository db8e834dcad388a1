"""Layers whose weights a fused path reads instead of calling them, and what happens once one is more than its weights.

An adapter, a pruning, a weight norm, a quantisation or a hook acts where a layer is called. A block therefore asks
`is_plain` before it reads a weight, and calls the layer, as its equations are written, where the answer is no.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import instance_norm_leaky_relu, residual_layer_norm
from trifuse.kernels.torch_internals import has_hooks, own_parameters

from .layer_scale import LayerScale
from .normalization import BatchNorm, InstanceNorm

PLAIN = (nn.Conv2d, nn.Linear, nn.LayerNorm, BatchNorm, InstanceNorm, LayerScale)


def is_plain(*layers: nn.Module) -> bool:
    """Return whether calling each layer gives what it is named for, by its parameters, and no more.

    Not of other classes, subclasses and parametrized layers included, and not with hooks, a forward of the instance's
    own, or a weight that computes in its own way, as a quantised one does.
    """
    for layer in layers:
        if type(layer) not in PLAIN or not as_its_class_says(layer):
            return False
        for parameter in own_parameters(layer):
            if type(parameter) is not nn.Parameter and hasattr(parameter, "__tensor_flatten__"):
                return False
    return True


def as_its_class_says(module: nn.Module) -> bool:
    """Return whether calling a module runs the forward of its class, and nothing else: no hooks, no other forward."""
    return not has_hooks(module) and "forward" not in module.__dict__


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to the last axis of vectors (B, C) or of maps (B, H, W, C)."""
    if is_plain(layer):
        return F.linear(x, layer.weight.flatten(1), layer.bias)  # type: ignore[operator,arg-type]
    projected: Tensor
    if x.ndim == 2:
        projected = layer(x[:, :, None, None]).flatten(1)
    else:
        projected = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return projected


def norm_leaky_relu(norm: nn.Module, x: Tensor, negative_slope: float) -> Tensor:
    """Normalise maps (B, C, H, W) by an `InstanceNorm`, and rectify them, both at once."""
    if not is_plain(norm):
        return F.leaky_relu(norm(x), negative_slope)
    weight, bias = norm.weight, norm.bias
    return instance_norm_leaky_relu(x, weight, bias, eps=norm.eps, negative_slope=negative_slope)  # type: ignore[arg-type]


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer norm to the channels of tokens (B, ..., C), strided as they may be."""
    if not _is_over_channels(norm, x):
        normalised: Tensor = norm(x)
        return normalised
    return residual_layer_norm(x, None, norm.weight, norm.bias, eps=norm.eps)[1]  # type: ignore[arg-type]


def _is_over_channels(norm: nn.Module, x: Tensor) -> bool:
    """Return whether a norm is a plain `nn.LayerNorm` of just the last dimension."""
    return isinstance(norm, nn.LayerNorm) and is_plain(norm) and norm.normalized_shape == x.shape[-1:]


def add_and_normalise(
    x: Tensor,
    branch: Tensor,
    norm: nn.Module,
    *,
    layer_scale: nn.Module | None = None,
    sample_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to its residual, and apply a layer norm to the sum, both at once; return both.

    Args:
        x: the residual, (B, ..., C).
        branch: what is added, (B, ..., C).
        norm: an `nn.LayerNorm` over the channels.
        layer_scale: a `LayerScale` that adds the branch; None adds it as it is.
        sample_scale: factor of the branch for each sample, (B,); not beside ``layer_scale``.
    """
    scaled_by_channel = layer_scale is None or (is_plain(layer_scale) and layer_scale.gamma.shape == x.shape[-1:])
    if scaled_by_channel and _is_over_channels(norm, x):
        factors = {"layer_scale": None if layer_scale is None else layer_scale.gamma, "sample_scale": sample_scale}
        return residual_layer_norm(x, branch, norm.weight, norm.bias, eps=norm.eps, **factors)  # type: ignore[arg-type]
    x = add_branch(x, branch, sample_scale) if layer_scale is None else layer_scale(x, branch)
    return x, normalise(norm, x)


def add_branch(x: Tensor, branch: Tensor, sample_scale: Tensor | None) -> Tensor:
    """Add a branch to its residual (B, ..., C), weighted by a factor of each sample, (B,), if there is one."""
    if sample_scale is None:
        return x + branch
    return torch.addcmul(x, branch, sample_scale.reshape(-1, *[1] * (x.ndim - 1)))


def norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise maps (B, C, H, W) and rectify them; by a `BatchNorm` both at once."""
    if isinstance(norm, BatchNorm) and is_plain(norm):
        return norm.activated(x, "relu")
    return torch.relu(norm(x))


class NormGeluSequential(nn.Sequential):
    """Run layers one after the other; a `BatchNorm` and the GELU that follows it at once."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and isinstance(layer, BatchNorm) and is_plain(layer) and _is_plain_gelu(layers[0]):
                x = layer.activated(x, "gelu")
                del layers[0]
            else:
                x = layer(x)
        return x


def _is_plain_gelu(layer: nn.Module) -> bool:
    exact = type(layer) is nn.GELU and layer.approximate == "none"
    return exact and as_its_class_says(layer)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """Return the type that a layer computes in: that of its weights, float32 for one without floating-point weights."""
    if is_plain(layer):
        return layer.weight.dtype  # type: ignore[return-value]
    return next((weight.dtype for weight in layer.parameters() if weight.is_floating_point()), torch.float32)
