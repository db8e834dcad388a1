"""Batch norm and activation: each channel, normalised over batch and positions, scaled, shifted and activated.

    n = (x - mean) * rstd,  rstd = 1 / sqrt(variance + eps)      in training, mean and variance over (b, h, w)
    z = n * weight + bias
    y = max(z, 0), or z * Phi(z), Phi the normal distribution    "relu", or "gelu"

    g = grad * dy/dz
    d y / d x:       weight * rstd * (g - mean of g - n * (mean of g * n)); with running statistics weight * rstd * g
    d y / d weight:  sum_{b, h, w} g * n
    d y / d bias:    sum_{b, h, w} g

Sources: Ioffe and Szegedy, Batch Normalization, 2015; Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.

What fusing saves: PyTorch writes the normalised map, reads it to activate it, and keeps it or the result for backward,
which writes and reads the gradient between the two. Here forward reads the map twice and writes the result, and
backward reads the gradient and the map twice and writes the map's gradient. The map and two numbers per channel are
saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import library
from trifuse.kernels.choices import check_choice
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.scalars import check_number
from trifuse.kernels.torch_internals import below_autograd

from ._map_shape import check_map

OP = "batch_norm_activation"
_FUNCTIONS = {"relu": torch.relu, "gelu": F.gelu}
ACTIVATIONS = tuple(_FUNCTIONS)


def batch_norm_activation_reference(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
) -> Tensor:
    """Define `batch_norm_activation`: subtract the mean, divide by the deviation, scale, shift and activate."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if training or running_mean is None or running_var is None:
        mean = wide.mean((0, 2, 3))
        variance = (wide - mean[:, None, None]).square().mean((0, 2, 3))
        if running_mean is not None and running_var is not None and x.numel():
            values = x.numel() // x.shape[1]
            with torch.no_grad():
                for running, value in ((running_mean, mean), (running_var, variance * (values / (values - 1)))):
                    running.copy_((1 - momentum) * running.to(value.dtype) + momentum * value)
    else:
        mean, variance = running_mean.to(wide.dtype), running_var.to(wide.dtype)
    z = (wide - mean[:, None, None]) * torch.rsqrt(variance + eps)[:, None, None]
    if weight is not None:
        z = z * weight.to(z.dtype)[:, None, None]
    if bias is not None:
        z = z + bias.to(z.dtype)[:, None, None]
    return _FUNCTIONS[activation](z).to(x.dtype)


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _composed(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> Tensor:
    """Return PyTorch's two layers, the rectifier in the place of what it is given; no form of our own is faster."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, variance, weight, bias = (  # of channels last maps, PyTorch reads them without their strides
        value if value is None or (value.dtype == dtype and value.is_contiguous()) else value.to(dtype).contiguous()
        for value in (*running, weight, bias)
    )
    normalised = F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    if training:
        for kept, updated in zip(running, (mean, variance), strict=True):
            if kept is not None and updated is not None and kept is not updated:
                with torch.no_grad():
                    kept.copy_(updated)
    if activation == "relu":
        return normalised.relu_()
    if 1 in x.shape:
        _lay_out_gradients(normalised)
    return F.gelu(normalised)


def _lay_out_gradients(normalised: Tensor) -> None:
    """Have the gradient that comes back strided as the map is, where a side of 1 leaves several layouts to read.

    PyTorch's batch norm on a CPU takes the two for one layout there, although they lie in memory in two.
    """
    if torch.compiler.is_compiling() or not normalised.requires_grad:
        return
    if library.under_functional_transform((normalised,)):
        return
    strides = normalised.stride()
    normalised.register_hook(
        lambda grad: grad if grad.stride() == strides else grad.new_empty_strided(grad.shape, strides).copy_(grad)
    )


# --------------------------------------------------------------------------------------- the registered operator


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from trifuse.kernels.gpu import batch_norm_activation as gpu

    if training and running_mean is not None and running_var is not None:
        for changed in (running_mean, running_var):
            if not changed.is_inference():  # what has no version
                torch.autograd.graph.increment_version(changed)
    return gpu.forward(x, weight, bias, running_mean, running_var, training, momentum, eps, activation)


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    eps: float | None,
    activation: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    from trifuse.kernels.gpu import batch_norm_activation_backward as gpu

    return gpu.backward(grad, x, weight, bias, means, rstds, eps, activation, needed)


def _shape_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    size = x.shape[1] if training else 0
    means, rstds = (x.new_empty(size, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), means, rstds


def _shape_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    eps: float | None,
    activation: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    affine = zip((weight, bias), needed[1:], strict=True)
    small = [value.new_empty(value.shape) for value, need in affine if value is not None and need]
    return [*([torch.empty_like(x)] if needed[0] else []), *small]


class _TritonNorm(Function):
    """The gradient of the registered operator; the means and reciprocal deviations are results without a gradient."""

    @staticmethod
    def forward(
        ctx: ForwardContext,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            out, means, rstds = torch.ops.trifuse.batch_norm_activation(
                x, weight, bias, running_mean, running_var, training, momentum, eps, activation
            )
        statistics = (means, rstds) if training else (running_mean, running_var)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.settings = None if training else eps, activation
        ctx.mark_non_differentiable(means, rstds)
        ctx.set_materialize_grads(False)  # which would be zeros for those two
        return out, means, rstds

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:3])
        grads = iter(torch.ops.trifuse.batch_norm_activation_backward(grad, *ctx.saved_tensors, *ctx.settings, needed))
        return *(next(grads) if need else None for need in needed), *[None] * 6


_AFFINE = "Tensor x, Tensor? weight, Tensor? bias"
_operator = library.register(
    f"{OP}({_AFFINE}, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps, "
    "str activation) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _shape_forward,
    lambda *arguments: _TritonNorm.apply(*arguments),
)
library.register(
    f"{OP}_backward(Tensor grad, {_AFFINE}, Tensor means, Tensor rstds, float? eps, str activation, bool[] needed)"
    " -> Tensor[]",
    _launch_backward,
    _shape_backward,
)


# ---------------------------------------------------------------------------------------------- the public face


@library.falls_back
def batch_norm_activation(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
) -> Tensor:
    """Normalise each channel over batch and positions, scale, shift, and activate: (B, C, H, W) -> same.

    Statistics are those of the batch in training, or where no running ones are given, and the running ones otherwise.
    In training the running ones are brought up to date in place, as `torch.nn.functional.batch_norm` does: by the mean,
    and by the variance with Bessel's correction. Autocast changes nothing. The result and all gradients are
    deterministic. The Triton path can be differentiated once; a second differentiation raises.

    Args:
        x: maps of shape (B, C, H, W), strided as they may be; float32, bfloat16, float16 or float64.
        running_mean: mean of each channel, (C,), any floating type; None, as ``running_var``, for none.
        running_var: variance of each channel, likewise.
        weight: scale of each channel, (C,), any floating type; None for 1.
        bias: shift of each channel, (C,), any floating type; None for 0.
        training: whether the batch's statistics are used, and remembered.
        momentum: share of the batch's statistics in the running ones.
        eps: added to the variance.
        activation: ``"relu"``, or ``"gelu"`` by the exact normal distribution.

    Returns:
        Tensor of shape (B, C, H, W) in the type of x and, where that is contiguous or channels last, in its memory
        layout, computed in float32 (float64 for float64 maps).

    Raises:
        ShapeError: x has another shape, or a single value per channel where the batch's statistics are used; another
            argument has another shape, or lies on another device; one running statistic without the other.
        TypeError: an argument is not floating point.
        ValueError: eps is negative, or an unknown activation.

    Sources: Ioffe and Szegedy, Batch Normalization, 2015; Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
    """
    given = {"x": x, "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    tensors = {name: value for name, value in given.items() if value is not None}
    training = training or running_mean is None
    _check(x, tensors, training, eps, activation)
    check_number(f"{OP}: momentum", momentum)
    settings = (training, float(momentum), float(eps), activation)
    backend = library.choose_backend(OP, x)
    if backend == "reference" or (x.numel() == 0 and backend == "torch"):
        return batch_norm_activation_reference(
            x, running_mean, running_var, weight, bias,
            training=training, momentum=momentum, eps=eps, activation=activation,
        )  # fmt: skip
    if backend == "triton" and not library.under_functional_transform([*tensors.values()]):
        return _operator(x, weight, bias, running_mean, running_var, *settings)[0]
    return _composed(x, (running_mean, running_var), weight, bias, *settings)


def _check(x: Tensor, tensors: dict[str, Tensor], training: bool, eps: float, activation: str) -> None:
    for name, value in tensors.items():
        library.check_dtype(OP, name, value)
    check_map(OP, "x", x)
    if ("running_mean" in tensors) != ("running_var" in tensors):
        raise ShapeError(f"{OP}: expected running_mean and running_var, or neither, got one; pass the other as well")
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ShapeError(
            f"{OP}: x needs more than one value per channel in training, got shape {tuple(x.shape)}; use a larger "
            "batch or map, or pass running statistics with training=False"
        )
    wanted = x.shape[1:2]
    for name, value in tensors.items():
        if value is not x and value.shape != wanted:
            raise ShapeError(
                f"{OP}: {name} has shape {tuple(value.shape)}; expected (C,) = {tuple(wanted)} for x of shape "
                f"{tuple(x.shape)}"
            )
    library.check_same_device(OP, tensors)
    if eps < 0:
        raise ValueError(f"{OP}: expected eps of at least 0, got {eps}")
    check_choice(f"{OP}: activation", activation, ACTIVATIONS)
