"""Instance norm and leaky rectifier: each channel of each sample, normalised over its positions, scaled and rectified.

    n = (x - mean) * rstd,  rstd = 1 / sqrt(variance + eps)      mean and variance over (h, w), per sample and channel
    z = n * weight + bias
    y = z where z > 0, else negative_slope * z

    g = grad where z > 0, else negative_slope * grad
    d y / d x:       weight * rstd * (g - mean of g - n * (mean of g * n))
    d y / d weight:  sum_{b, h, w} g * n
    d y / d bias:    sum_{b, h, w} g

Sources: Ulyanov et al., Instance Normalization, 2016; Maas et al., Rectifier Nonlinearities, 2013. The pair follows
every convolution of nnU-Net (Isensee et al., 2021).

What fusing saves: under bfloat16 autocast PyTorch normalises in float32, with a copy of the map on either side, and
rectifies that; backward does the same. Here maps stay in their type: forward reads the map and writes the result, and
backward reads the gradient and the map and writes the map's gradient, in one pass over planes of moderate size and in
two over larger ones. The map and two numbers per plane are saved, the normalised map is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import library
from trifuse.kernels.cpu.instance_norm import instance_norm, instance_norm_gradients
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.torch_internals import below_autograd

from ._map_shape import check_map

OP = "instance_norm_leaky_relu"


def instance_norm_leaky_relu_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
) -> Tensor:
    """Define `instance_norm_leaky_relu`: subtract the mean, divide by the deviation, scale, shift and rectify."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean((2, 3), keepdim=True)
    z = centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + eps)
    if weight is not None:
        z = z * weight.to(z.dtype)[:, None, None]
    if bias is not None:
        z = z + bias.to(z.dtype)[:, None, None]
    return F.leaky_relu(z, negative_slope).to(x.dtype)


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _normalised_and_rectified(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, means, rstds = instance_norm(x, weight, bias, eps)
    return F.leaky_relu_(out, slope), means, rstds


class _EagerNorm(Function):
    """The CPU path, in two passes each way: the rectifier works in place, on what the normalisation wrote.

    The sign of what it rectified is that of the result, which the next layer keeps anyway.
    """

    @staticmethod
    def forward(
        ctx: ForwardContext, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
    ) -> Tensor:
        out, means, rstds = _normalised_and_rectified(x, weight, bias, eps, slope)
        ctx.save_for_backward(x, weight, means, rstds, out)
        ctx.slope = slope
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, means, rstds, out = ctx.saved_tensors
        grad = torch.ops.aten.leaky_relu_backward(grad, out, ctx.slope, True)
        return *instance_norm_gradients(grad, x, weight, means, rstds, ctx.needs_input_grad[:3]), None, None


# --------------------------------------------------------------------------------------- the registered operator


def _launch_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    from trifuse.kernels.gpu import instance_norm_leaky_relu as gpu

    return gpu.forward(x, weight, bias, eps, negative_slope)


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    negative_slope: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    from trifuse.kernels.gpu import instance_norm_leaky_relu_backward as gpu

    return gpu.backward(grad, x, weight, bias, means, rstds, negative_slope, needed)


def _shape_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    means, rstds = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), means, rstds


def _shape_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    negative_slope: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    affine = zip((weight, bias), needed[1:], strict=True)
    small = [value.new_empty(value.shape) for value, need in affine if value is not None and need]
    return [*([torch.empty_like(x)] if needed[0] else []), *small]


class _TritonNorm(Function):
    """The gradient of the registered operator; the means and reciprocal deviations are results without a gradient."""

    @staticmethod
    def forward(
        ctx: ForwardContext, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            out, means, rstds = torch.ops.trifuse.instance_norm_leaky_relu(x, weight, bias, eps, negative_slope)
        ctx.save_for_backward(x, weight, bias, means, rstds)
        ctx.negative_slope = negative_slope
        ctx.mark_non_differentiable(means, rstds)
        ctx.set_materialize_grads(False)  # which would be zeros for those two
        return out, means, rstds

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:3])
        grads = iter(
            torch.ops.trifuse.instance_norm_leaky_relu_backward(grad, *ctx.saved_tensors, ctx.negative_slope, needed)
        )
        return *(next(grads) if need else None for need in needed), None, None


_AFFINE = "Tensor x, Tensor? weight, Tensor? bias"
_operator = library.register(
    f"{OP}({_AFFINE}, float eps, float negative_slope) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _shape_forward,
    lambda *arguments: _TritonNorm.apply(*arguments),
)
library.register(
    f"{OP}_backward(Tensor grad, {_AFFINE}, Tensor means, Tensor rstds, float negative_slope, bool[] needed)"
    " -> Tensor[]",
    _launch_backward,
    _shape_backward,
)


# ---------------------------------------------------------------------------------------------- the public face


@library.falls_back
def instance_norm_leaky_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
) -> Tensor:
    """Normalise each channel of each sample over its positions, scale, shift, and rectify: (B, C, H, W) -> same.

    Statistics are always those of the sample itself, as in training; autocast changes nothing. The result and all
    gradients are deterministic on every backend. The Triton and CPU paths can be differentiated once; a second
    differentiation raises.

    Args:
        x: maps of shape (B, C, H, W), strided as they may be; float32, bfloat16, float16 or float64.
        weight: scale of each channel, (C,), any floating type; None for 1.
        bias: shift of each channel, (C,), any floating type; None for 0.
        eps: added to the variance.
        negative_slope: factor of what is negative.

    Returns:
        Tensor of shape (B, C, H, W) in the type of x and, where that is contiguous or channels last, in its memory
        layout, computed in float32 (float64 for float64 maps).

    Raises:
        ShapeError: x has another shape, or a single position, which has no deviation; weight or bias has another
            shape, or lies on another device.
        TypeError: an argument is not floating point.
        ValueError: eps or the slope is negative.

    Sources: Ulyanov et al., Instance Normalization, 2016; Maas et al., Rectifier Nonlinearities, 2013.
    """
    _check(x, weight, bias, eps, negative_slope)
    backend = library.choose_backend(OP, x)
    given = [value for value in (x, weight, bias) if value is not None]
    transformed = backend != "reference" and library.under_functional_transform(given)
    if backend == "triton" and not transformed:
        return _operator(x, weight, bias, eps, negative_slope)[0]
    composed = x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling()
    if backend == "reference" or transformed or composed:
        return instance_norm_leaky_relu_reference(x, weight, bias, eps=eps, negative_slope=negative_slope)
    if weight is None and bias is not None:  # PyTorch's gradient has no form for it
        weight = torch.ones_like(bias)
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (value if value is None else value.to(dtype).contiguous() for value in (weight, bias))
    if torch.is_grad_enabled() and any(value.requires_grad for value in given):
        return _EagerNorm.apply(x, weight, bias, eps, negative_slope)
    return _normalised_and_rectified(x, weight, bias, eps, negative_slope)[0]


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float) -> None:
    given = {"x": x, "weight": weight, "bias": bias}
    tensors = {name: value for name, value in given.items() if value is not None}
    for name, value in tensors.items():
        library.check_dtype(OP, name, value)
    check_map(OP, "x", x)
    if x.shape[2] * x.shape[3] == 1:
        raise ShapeError(
            f"{OP}: x needs more than one value per channel and sample, got shape {tuple(x.shape)}; use a larger map"
        )
    for name, value in tensors.items():
        if name != "x" and value.shape != x.shape[1:2]:
            raise ShapeError(
                f"{OP}: {name} has shape {tuple(value.shape)}; expected (C,) = {tuple(x.shape[1:2])} for x of shape "
                f"{tuple(x.shape)}"
            )
    library.check_same_device(OP, tensors)
    if eps < 0 or negative_slope < 0:
        raise ValueError(f"{OP}: expected eps and negative_slope of at least 0, got {eps} and {negative_slope}")
