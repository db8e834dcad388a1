"""A residual sum and the layer norm that follows it: what a branch returns is weighted, added and normalised.

    s = x + layer_scale * sample_scale * branch             (B, ..., C); factors per channel and per sample
    n = (s - mean) * rstd,  rstd = 1 / sqrt(variance + eps)           mean and variance over the channels of a token
    y = n * weight + bias;  the results are s and y

    h = d y * weight
    d s = incoming gradient of s + rstd * (h - mean of h - n * (mean of h * n))
    d x = d s;  d branch = layer_scale * sample_scale * d s
    d weight = sum d y * n;  d bias = sum d y;  d layer_scale = sum sample_scale * branch * d s      over all tokens

Sources: Ba et al., Layer Normalization, 2016; Touvron et al., Going deeper with Image Transformers, Eq. 4 (LayerScale);
Huang et al., Deep Networks with Stochastic Depth, 2016 (the factor of each sample). Every block of a pre-norm
transformer does it twice.

What fusing saves: PyTorch writes the sum, reads it to normalise it, and under autocast writes the result in float32,
which the next layer casts. Here forward reads both terms and writes both results, the second in autocast's type;
backward reads the two gradients and the sum, and writes the gradient that x and branch share. Two numbers per token are
saved, and the sum, which the next block needs anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import library
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.torch_internals import below_autograd

OP = "residual_layer_norm"


def residual_layer_norm_reference(
    x: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Define `residual_layer_norm`: weigh and add; subtract the mean, divide by the deviation, scale and shift."""
    total = x
    if branch is not None:
        wide = branch.to(torch.promote_types(x.dtype, torch.float32))
        if layer_scale is not None:
            wide = wide * layer_scale.to(wide.dtype)
        if sample_scale is not None:
            wide = wide * _per_sample(sample_scale.to(wide.dtype), x)
        total = (x.to(wide.dtype) + wide).to(x.dtype)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    z = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        z = z * weight.to(z.dtype)
    if bias is not None:
        z = z + bias.to(z.dtype)
    return total, z.to(_normalised_dtype(total))


def _per_sample(scale: Tensor, x: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (x.ndim - 1))


def _normalised_dtype(x: Tensor) -> torch.dtype:
    """Return the type of what is normalised: that of the residual, or autocast's where it is on."""
    kind = x.device.type
    if x.dtype != torch.float64 and library.autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _composed(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute both results with PyTorch's own layer norm, which no other form on a CPU outruns."""
    total = x
    if branch is not None:
        factor = layer_scale
        if sample_scale is not None:
            of_samples = _per_sample(sample_scale, x)
            factor = of_samples if layer_scale is None else of_samples * layer_scale
        total = x + branch if factor is None else torch.addcmul(x, branch, factor)
        total = total if total.dtype == x.dtype else total.to(x.dtype)  # small tensors feel every call, idle or not
    dtype, wide = _normalised_dtype(x), total
    if any(value is not None and value.dtype != x.dtype for value in (weight, bias)):
        wide = total.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = (value if value is None else value.to(wide.dtype) for value in (weight, bias))
    normalised = F.layer_norm(wide, x.shape[-1:], weight, bias, eps)
    return total, normalised if normalised.dtype == dtype else normalised.to(dtype)


# --------------------------------------------------------------------------------------- the registered operator


def _launch_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from trifuse.kernels.gpu import residual_layer_norm as gpu

    return gpu.forward(x, branch, weight, bias, layer_scale, sample_scale, eps, dtype)


def _launch_backward(
    total_grad: Tensor | None,
    grad: Tensor,
    total: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    branch_dtype: torch.dtype,
    needed: Sequence[bool],
) -> list[Tensor]:
    from trifuse.kernels.gpu import residual_layer_norm_backward as gpu

    parameters = (weight, bias, layer_scale, sample_scale)
    return gpu.backward(total_grad, grad, total, branch, *parameters, means, rstds, branch_dtype, needed)


def _shape_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if branch is None else x.shape)
    means, rstds = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), total, means, rstds


def _shape_backward(
    total_grad: Tensor | None,
    grad: Tensor,
    total: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    branch_dtype: torch.dtype,
    needed: Sequence[bool],
) -> list[Tensor]:
    maps = [total.new_empty(total.shape), total.new_empty(total.shape, dtype=branch_dtype)]
    small = zip((weight, bias, layer_scale), needed[2:], strict=True)
    return [
        *(value for value, need in zip(maps, needed[:2], strict=True) if need),
        *(value.new_empty(value.shape) for value, need in small if value is not None and need),
    ]


class _TritonNorm(Function):
    """The gradient of the registered operator; the means and reciprocal deviations are results without a gradient."""

    @staticmethod
    def forward(
        ctx: ForwardContext,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        sample_scale: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with below_autograd():
            normalised, total, means, rstds = torch.ops.trifuse.residual_layer_norm(
                x, branch, weight, bias, layer_scale, sample_scale, eps, dtype
            )
        read_again = branch if ctx.needs_input_grad[4] else None
        statistics = (means, rstds)
        summed = x if branch is None else total
        ctx.save_for_backward(summed, read_again, weight, bias, layer_scale, sample_scale, *statistics)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.mark_non_differentiable(*statistics, *([total] if branch is None else []))
        ctx.set_materialize_grads(False)  # which would be zeros for those
        return normalised, total, means, rstds

    @staticmethod
    @once_differentiable
    def backward(
        ctx: BackwardContext, grad: Tensor | None, total_grad: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        summed, branch, weight, bias, layer_scale, sample_scale, *statistics = ctx.saved_tensors
        if grad is None:  # nothing depends on what is normalised
            grad = torch.zeros_like(summed)
        of_x, of_branch, *small = ctx.needs_input_grad[:5]
        shared = layer_scale is None and sample_scale is None and ctx.branch_dtype == summed.dtype
        needed = [of_x or (of_branch and shared), of_branch and not shared, *small]
        arguments = (total_grad, grad, summed, branch, weight, bias, layer_scale, sample_scale, *statistics)
        branch_dtype = ctx.branch_dtype or summed.dtype
        found = iter(torch.ops.trifuse.residual_layer_norm_backward(*arguments, branch_dtype, needed))
        grads = [next(found) if need else None for need in needed]
        x_grad = grads[0] if of_x else None
        branch_grad = grads[0] if of_branch and shared else grads[1]
        return x_grad, branch_grad, *grads[2:], None, None, None


_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? layer_scale, Tensor? sample_scale"
_operator = library.register(
    f"{OP}(Tensor x, Tensor? branch, {_PARAMETERS}, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _shape_forward,
    lambda *arguments: _TritonNorm.apply(*arguments),
)
library.register(
    f"{OP}_backward(Tensor? total_grad, Tensor grad, Tensor total, Tensor? branch, {_PARAMETERS}, Tensor means, "
    "Tensor rstds, ScalarType branch_dtype, bool[] needed) -> Tensor[]",
    _launch_backward,
    _shape_backward,
)


# ---------------------------------------------------------------------------------------------- the public face


@library.falls_back
def residual_layer_norm(
    x: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add a branch to its residual, and normalise the sum over its channels: (B, ..., C) -> twice the same.

    The sum is ``x + layer_scale * sample_scale * branch``, rounded to its type before it is normalised. Results and
    gradients are deterministic on every backend. The Triton path can be differentiated once; a second differentiation
    raises. Plain PyTorch, which CPU tensors use, can be differentiated again.

    Args:
        x: residual of shape (B, ..., C), strided as it may be; float32, bfloat16, float16 or float64.
        branch: what is added, (B, ..., C), any floating type; None adds nothing: a plain layer norm.
        weight: scale of each channel, (C,), any floating type; None for 1.
        bias: shift of each channel, (C,), any floating type; None for 0.
        layer_scale: factor of the branch for each channel, (C,), any floating type (LayerScale); None for 1.
        sample_scale: factor of the branch for each sample, (B,), any floating type, without a gradient: a draw of
            stochastic depth, 0 for what is dropped; None for 1.
        eps: added to the variance.

    Returns:
        The sum, in the type of x (x itself where nothing is added), and the sum normalised, in the same type: under
        autocast in autocast's, as the layer that follows would cast it. Computed in float32 (float64 for float64
        tensors); from the kernels, contiguous.

    Raises:
        ShapeError: x has fewer than two dimensions, or another argument does not have the shape above, or lies on
            another device.
        TypeError: an argument is not floating point.
        ValueError: eps is negative, factors are given for a branch that is not, or ``sample_scale`` requires a
            gradient.

    Sources: Ba et al., Layer Normalization, 2016; Touvron et al., Going deeper with Image Transformers, Eq. 4.
    """
    _check(x, branch, weight, bias, layer_scale, sample_scale, eps)
    backend = library.choose_backend(OP, x)
    given = [value for value in (x, branch, weight, bias, layer_scale, sample_scale) if value is not None]
    if backend == "reference":
        return residual_layer_norm_reference(
            x, branch, weight, bias, layer_scale=layer_scale, sample_scale=sample_scale, eps=eps
        )
    if backend == "torch" or library.under_functional_transform(given):
        return _composed(x, branch, weight, bias, layer_scale, sample_scale, eps)
    arguments = (x, branch, weight, bias, layer_scale, sample_scale, eps, _normalised_dtype(x))
    normalised, total, *_ = _operator(*arguments)
    return x if branch is None else total, normalised


def _check(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    eps: float,
) -> None:
    named = {"x": x, "branch": branch, "weight": weight, "bias": bias}
    named |= {"layer_scale": layer_scale, "sample_scale": sample_scale}
    tensors = {name: value for name, value in named.items() if value is not None}
    for name, value in tensors.items():
        library.check_dtype(OP, name, value)
    if x.ndim < 2:
        raise ShapeError(f"{OP}: x has shape {tuple(x.shape)}; expected (B, ..., C); add what is missing with x[None]")
    expected = {"branch": ("(B, ..., C)", x.shape), "sample_scale": ("(B,)", x.shape[:1])}
    for name, value in tensors.items():
        letters, shape = expected.get(name, ("(C,)", x.shape[-1:]))
        if name != "x" and value.shape != shape:
            raise ShapeError(
                f"{OP}: {name} has shape {tuple(value.shape)}; expected {letters} = {tuple(shape)} for x of shape "
                f"{tuple(x.shape)}"
            )
    library.check_same_device(OP, tensors)
    if eps < 0:
        raise ValueError(f"{OP}: expected eps of at least 0, got {eps}")
    if branch is None and len(tensors.keys() & {"layer_scale", "sample_scale"}) > 0:
        raise ValueError(f"{OP}: layer_scale and sample_scale are factors of a branch, which is None; pass the branch")
    if sample_scale is not None and sample_scale.requires_grad:
        raise ValueError(f"{OP}: sample_scale requires a gradient, and has none; pass sample_scale.detach()")
