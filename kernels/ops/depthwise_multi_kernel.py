"""Depthwise convolutions of several kernel sizes on one map, added up: computed as one convolution.

    y[b, c] = x[b, c] + sum_m W_m[c] * x[b, c]                         * : "same" convolution, zeros around the map
            = V[c] * x[b, c],   V = delta + sum_m pad(W_m)             pad: to the largest kernel, around its centre

    d y / d x:    the gradient convolved with V turned by half a turn
    d y / d W_m:  the centre, as large as W_m, of
                  dV[c, i, j] = sum_{b,h,w} grad[b, c, h, w] x[b, c, h + i - K // 2, w + j - K // 2]

Nothing stands between the parallel convolutions, neither norm nor activation, so one kernel does exactly what all of
them do, in training as well.

Source: FIAS, the depthwise multi-kernel encoder (kernels 5 and 7 and the identity).

What fusing saves: two convolutions and two additions read six maps and write four, and again in backward; here forward
reads one map and writes one. Nothing but the arguments and the merged kernel is saved for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import library
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.torch_internals import below_autograd

OP = "depthwise_multi_kernel"
# Larger tiles repeat fewer of the pixels around them; from 64 on it no longer shows.
TILE_SIDE = 64
# So many elements of a map are cut into tiles at a time.
CHUNK_ELEMENTS = 1 << 18


def depthwise_multi_kernel_reference(x: Tensor, weights: Sequence[Tensor], *, residual: bool = True) -> Tensor:
    """Define `depthwise_multi_kernel`: convolve with each kernel on its own, add up."""
    kept = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(kept)
    total = wide if residual else torch.zeros_like(wide)
    for weight in weights:
        total = total + _convolve(wide, weight.to(kept))
    return total.to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, padding: int | None = None) -> Tensor:
    """Convolve each channel with its own odd kernel, with zeros around the map, whatever autocast says."""
    if x.numel() == 0:  # refused by PyTorch's convolution; the kernels still have gradients, zeros
        return x * weight.sum((1, 2, 3))[:, None, None]
    padding = weight.shape[-1] // 2 if padding is None else padding
    with _without_autocast(x.device):
        return F.conv2d(x, weight, padding=padding, groups=weight.shape[0])


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    at_work = library.autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if at_work else nullcontext()


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _merged(weights: Sequence[Tensor], residual: bool, dtype: torch.dtype) -> Tensor:
    """Return the one kernel (C, 1, K, K) that does what all of them do together."""
    sides = [weight.shape[-1] for weight in weights]
    largest = sides.index(max(sides))
    total = weights[largest].to(dtype, copy=True, memory_format=torch.contiguous_format)
    for i, weight in enumerate(weights):
        if i != largest:
            _under(total, sides[i]).add_(weight)
    if residual:
        _under(total, 1).add_(1)
    return total


def _under(kernel: Tensor, side: int) -> Tensor:
    """View what lies under a smaller kernel around the same centre."""
    rim = (kernel.shape[-1] - side) // 2
    return kernel[:, :, rim : rim + side, rim : rim + side]


def _format(x: Tensor) -> torch.memory_format:
    """Return the memory format that a result computed from ``x`` gets."""
    return torch.channels_last if x.stride(1) == 1 and not x.is_contiguous() else torch.contiguous_format


def _convolve_as_stored(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve in the type of the kernel; the result has the type and the memory format of ``x``."""
    memory_format = _format(x)
    out = _convolve(x.to(kernel.dtype, memory_format=memory_format), kernel)
    return out.to(x.dtype, memory_format=memory_format)


def _kernel_gradient(grad: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """Return the gradient of the merged kernel, in its type, some samples at a time."""
    samples = max(1, CHUNK_ELEMENTS // x[0].numel())
    parts = [_tiled_gradient(*pair, kernel) for pair in zip(grad.split(samples), x.split(samples), strict=True)]
    return torch.stack(parts).sum(0)


def _tiled_gradient(grad: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """Return the kernel's gradient as a convolution: tiles of the map by tiles of the gradient.

    Every tile of every channel is a channel of its own, and the tiles' results are added up. So the fast forward
    convolution does the work that the convolution's own backward takes several times as long for.
    """
    (batch, channels, height, width), side = x.shape, kernel.shape[-1]
    down, across = -(-height // TILE_SIDE), -(-width // TILE_SIDE)
    tile_height, tile_width = -(-height // down), -(-width // across)
    rest = [0, across * tile_width - width, 0, down * tile_height - height]
    kernels = F.pad(grad.to(kernel.dtype), rest).unflatten(3, (across, tile_width)).unflatten(2, (down, tile_height))
    kernels = kernels.permute(2, 4, 0, 1, 3, 5).reshape(-1, 1, tile_height, tile_width)

    planes = kernel.new_zeros((down * tile_height + side - 1, across * tile_width + side - 1, batch, channels))
    planes[side // 2 :, side // 2 :][:height, :width] = x.permute(2, 3, 0, 1)
    tiles = planes.unfold(0, tile_height + side - 1, tile_height).unfold(1, tile_width + side - 1, tile_width)
    tiles = tiles.permute(4, 5, 0, 1, 2, 3).flatten(2).permute(2, 0, 1)
    return _convolve(tiles[None], kernels, padding=0).view(-1, *kernel.shape).sum(0)


def _part(kernel: Tensor, weight: Tensor) -> Tensor:
    """Cut from the merged kernel what lies under one of its parts."""
    return _under(kernel, weight.shape[-1]).to(weight.dtype, memory_format=torch.contiguous_format)


class _MergedConvolution(Function):
    """The CPU path with its own backward, so that no copy in another memory format is saved."""

    @staticmethod
    def forward(ctx: ForwardContext, residual: bool, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.residual, trains = residual, any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if trains else None, *weights)
        if x.numel() == 0:
            return torch.empty_like(x, memory_format=_format(x))
        kept = torch.promote_types(x.dtype, torch.float32)
        return _convolve_as_stored(x, _merged(weights, residual, kept))

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        _, needs_x, *needs_weights = ctx.needs_input_grad
        if grad.numel() == 0:
            return None, grad, *(torch.zeros_like(weight) for weight in weights)
        kernel = _merged(weights, ctx.residual, torch.promote_types(grad.dtype, torch.float32))
        x_grad = _convolve_as_stored(grad, kernel.flip(2, 3)) if needs_x else None
        if x is None:
            return None, x_grad, *(None for _ in weights)
        kernel_grad = _kernel_gradient(grad, x, kernel)
        pairs = zip(weights, needs_weights, strict=True)
        return None, x_grad, *(_part(kernel_grad, weight) if needed else None for weight, needed in pairs)


# --------------------------------------------------------------------------------------- the registered operator


def _launch_forward(x: Tensor, weights: Sequence[Tensor], residual: bool) -> tuple[Tensor, Tensor]:
    from trifuse.kernels.gpu import depthwise_multi_kernel as gpu

    merged = gpu.merge(weights, residual)
    return gpu.convolve(x, merged, _format(x), flipped=False), merged


def _launch_input_gradient(grad: Tensor, merged: Tensor) -> Tensor:
    from trifuse.kernels.gpu import depthwise_multi_kernel as gpu

    return gpu.convolve(grad, merged, _format(grad), flipped=True)


def _launch_weight_gradients(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    from trifuse.kernels.gpu import depthwise_multi_kernel_backward as gpu

    return gpu.weight_gradients(grad, x, weights, needed)


def _shape_forward(x: Tensor, weights: Sequence[Tensor], residual: bool) -> tuple[Tensor, Tensor]:
    side = max(weight.shape[-1] for weight in weights)
    merged = x.new_empty((side * side, x.shape[1]), dtype=torch.float32)
    return torch.empty_like(x, memory_format=_format(x)), merged


def _shape_input_gradient(grad: Tensor, merged: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=_format(grad))


def _shape_weight_gradients(grad: Tensor, x: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [weight.new_empty(weight.shape) for weight, need in zip(weights, needed, strict=True) if need]


class _TritonConvolution(Function):
    """The gradient of the registered operator: only what is asked for is saved, computed and returned."""

    @staticmethod
    def forward(ctx: ForwardContext, residual: bool, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, merged = torch.ops.trifuse.depthwise_multi_kernel(x, weights, residual)
        trains = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if trains else None, merged, *weights)
        ctx.mark_non_differentiable(merged)
        ctx.set_materialize_grads(False)  # or zeros would be made for the merged kernel
        return out, merged

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor, merged_grad: None) -> tuple[Tensor | None, ...]:
        x, merged, *weights = ctx.saved_tensors
        _, needs_x, *needed = ctx.needs_input_grad
        ops = torch.ops.trifuse
        x_grad = ops.depthwise_multi_kernel_input_gradient(grad, merged) if needs_x else None
        grads = iter(ops.depthwise_multi_kernel_weight_gradients(grad, x, weights, needed) if any(needed) else ())
        return None, x_grad, *(next(grads) if need else None for need in needed)


def _differentiate(x: Tensor, weights: Sequence[Tensor], residual: bool) -> tuple[Tensor, Tensor]:
    return _TritonConvolution.apply(residual, x, *weights)


_operator = library.register(
    f"{OP}(Tensor x, Tensor[] weights, bool residual) -> (Tensor, Tensor)",
    _launch_forward,
    _shape_forward,
    _differentiate,
)
library.register(
    f"{OP}_input_gradient(Tensor grad, Tensor merged) -> Tensor", _launch_input_gradient, _shape_input_gradient
)
library.register(
    f"{OP}_weight_gradients(Tensor grad, Tensor x, Tensor[] weights, bool[] needed) -> Tensor[]",
    _launch_weight_gradients,
    _shape_weight_gradients,
)


# ---------------------------------------------------------------------------------------------- the public face


@library.falls_back
def depthwise_multi_kernel(x: Tensor, weights: Sequence[Tensor], *, residual: bool = True) -> Tensor:
    """Convolve each channel with several kernels around the same centre, and add up, with the map itself or without.

    The kernels are merged into one, exactly; each still gets its own gradient. Outside the map there are zeros, and
    the map may be smaller than the kernels. The result and all gradients are deterministic on every backend. The Triton
    and CPU paths can be differentiated once; a second differentiation raises.

    Args:
        x: map of shape (B, C, H, W), float32, bfloat16, float16 or float64; strided views are taken as they are, with
            channels or columns innermost.
        weights: sequence of kernels of shape (C, 1, k, k), k odd, any floating type each, for instance the weights of
            depthwise `torch.nn.Conv2d` layers.
        residual: whether the map itself is added.

    Returns:
        Tensor of shape (B, C, H, W), in the type of ``x``, accumulated in float32 (float64 for a float64 map). It is
        channels_last where ``x`` is (channels innermost), else contiguous.

    Raises:
        ShapeError: a map that is not (B, C, H, W), no kernels, kernels that are not (C, 1, k, k) with k odd, or
            arguments on different devices.
        TypeError: a map or a kernel that is not floating point.

    Examples:
        >>> x = torch.randn(2, 72, 64, 64)
        >>> fused = depthwise_multi_kernel(x, [torch.randn(72, 1, 5, 5), torch.randn(72, 1, 7, 7)])

    Source: FIAS, the depthwise multi-kernel encoder; see the module's docstring for the gradients.
    """
    weights = _checked(x, weights)
    backend = library.choose_backend(OP, x)
    if backend == "reference" or library.under_functional_transform((x, *weights)):
        return depthwise_multi_kernel_reference(x, weights, residual=residual)
    if backend == "triton":
        return _operator(x, weights, residual)[0]
    if x.device.type != "cpu" or library.without_values((x, *weights)):
        return _convolve_as_stored(x, _merged(weights, residual, torch.promote_types(x.dtype, torch.float32)))
    return _MergedConvolution.apply(residual, x, *weights)


def _checked(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the kernels as a tuple, or raise what is wrong with the arguments."""
    library.check_dtype(OP, "x", x)
    if x.ndim != 4:
        raise ShapeError(f"{OP}: x has shape {tuple(x.shape)}; expected a map (B, C, H, W)")
    kernels = tuple(weights)
    if not kernels:
        raise ShapeError(f"{OP}: weights is empty; expected at least one kernel of shape (C, 1, k, k)")
    for i, weight in enumerate(kernels):
        library.check_dtype(OP, f"weights[{i}]", weight)
        side = weight.shape[-1] if weight.ndim else 0
        if weight.shape != (x.shape[1], 1, side, side) or side % 2 == 0:
            raise ShapeError(
                f"{OP}: weights[{i}] has shape {tuple(weight.shape)}; expected ({x.shape[1]}, 1, k, k) with k odd: one "
                f"kernel for each of the {x.shape[1]} channels of x"
            )
    library.check_same_device(OP, {"x": x, "weights": kernels})
    return kernels
