"""Temporal FiLM gate: a map and an ECG's vector, mixed, modulated by the time between them, and added to the map.

    mixed = features * w_mri + ecg * w_ecg                       (B, C, H, W); ecg and all below per sample and channel
    out   = features + mixed * (1 + scale) + shift

The whole is one affine map per sample and channel, so the ECG's map is never made:

    out = a * features + b,   a = 1 + w_mri (1 + scale),   b = w_ecg ecg (1 + scale) + shift

    d out / d features:  a * grad
    d out / d a:         sum_{h, w} grad * features
    d out / d b:         sum_{h, w} grad

and the gradients of ecg, weights, scale and shift follow from those of a and b on (B, C) numbers.

Source: temporal-aware feature fusion of TAFF-UNet (LGE MRI and ECG); FiLM is Perez et al., 2018.

What fusing saves: step by step, forward moves thirteen maps, and backward about twenty. Here forward reads one and
writes one; backward reads the gradient and the map and writes the map's gradient, in one pass. No map is saved but the
one that came in, and that only where another gradient than its own is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trifuse.kernels import library
from trifuse.kernels.cpu.channel_affine import channel_affine, channel_affine_gradients
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.torch_internals import below_autograd

from ._map_shape import check_map

OP = "temporal_film_gate"


def temporal_film_gate_reference(
    features: Tensor, ecg: Tensor, weights: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """Define `temporal_film_gate`: spread the ECG over the map, mix, modulate, and add the result to the map."""
    compute_dtype = torch.promote_types(features.dtype, torch.float32)
    f, p, w, gamma, beta = (value.to(compute_dtype) for value in (features, ecg, weights, scale, shift))
    spread = p[:, :, None, None].expand_as(f)
    mixed = f * w[:, 0, None, None, None] + spread * w[:, 1, None, None, None]
    return (f + mixed * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]).to(features.dtype)


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _coefficients(
    ecg: Tensor, weights: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a and b of the affine map, (B, C) each, in the type that sums are made in."""
    ecg, weights, scale, shift = (value.to(dtype) for value in (ecg, weights, scale, shift))
    modulation = 1 + scale
    return 1 + weights[:, :1] * modulation, weights[:, 1:] * ecg * modulation + shift


def _affine(features: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Apply the affine map with differentiable operations alone, which compilers and transforms see through."""
    return (features.to(a.dtype) * a[:, :, None, None] + b[:, :, None, None]).to(features.dtype)


class _ChannelAffine(Function):
    """The CPU path: a map in planes is passed over once each way, and no wider copy of any map is saved."""

    @staticmethod
    def forward(ctx: ForwardContext, features: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, *((features,) if a.requires_grad else ()))
        return channel_affine(features, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, *saved = ctx.saved_tensors
        features = saved[0] if saved else grad  # any map of this shape, where the gradient of a is not asked for
        return channel_affine_gradients(grad, features, a, ctx.needs_input_grad)


# --------------------------------------------------------------------------------------- the registered operator


def _launch_forward(features: Tensor, ecg: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    from trifuse.kernels.gpu import temporal_film_gate as gpu

    return gpu.forward(features, ecg, weights, scale, shift)


def _launch_backward(
    grad: Tensor,
    features: Tensor | None,
    ecg: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
    needs_features: bool,
) -> list[Tensor]:
    from trifuse.kernels.gpu import temporal_film_gate as gpu

    return gpu.backward(grad, features, ecg, weights, scale, shift, needs_features)


def _shape_backward(
    grad: Tensor,
    features: Tensor | None,
    ecg: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
    needs_features: bool,
) -> list[Tensor]:
    small = [] if features is None else [value.new_empty(value.shape) for value in (ecg, weights, scale, shift)]
    return [*small, *([torch.empty_like(grad if features is None else features)] if needs_features else [])]


class _TritonGate(Function):
    """The gradient of the registered operator: the map is saved where a gradient other than its own is asked for."""

    @staticmethod
    def forward(ctx: ForwardContext, features: Tensor, *small: Tensor) -> Tensor:
        ctx.save_for_backward(*small, *((features,) if any(ctx.needs_input_grad[1:]) else ()))
        with below_autograd():
            gated: Tensor = torch.ops.trifuse.temporal_film_gate(features, *small)
            return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        *small, features = ctx.saved_tensors if any(ctx.needs_input_grad[1:]) else (*ctx.saved_tensors, None)
        needs_features, *needs_small = ctx.needs_input_grad
        grads = torch.ops.trifuse.temporal_film_gate_backward(grad, features, *small, needs_features)
        asked = (value if need else None for value, need in zip(grads, needs_small, strict=False))
        return grads[-1] if needs_features else None, *(asked if any(needs_small) else (None,) * 4)


_SMALL = "Tensor ecg, Tensor weights, Tensor scale, Tensor shift"
_operator = library.register(
    f"{OP}(Tensor features, {_SMALL}) -> Tensor",
    _launch_forward,
    lambda features, *small: torch.empty_like(features),
    lambda *arguments: _TritonGate.apply(*arguments),
)
library.register(
    f"{OP}_backward(Tensor grad, Tensor? features, {_SMALL}, bool needs_features) -> Tensor[]",
    _launch_backward,
    _shape_backward,
)


# ---------------------------------------------------------------------------------------------- the public face


@library.falls_back
def temporal_film_gate(features: Tensor, ecg: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Mix a map with an ECG's vector, modulate, and add to the map: features + mixed * (1 + scale) + shift.

    ``mixed = features * w_mri + ecg * w_ecg``. Where a sample's weights, scale and shift are 0 and its ecg is finite,
    its result equals its features. The result and all gradients are deterministic on every backend. The Triton and CPU
    paths can be differentiated once; a second differentiation raises.

    Args:
        features: maps of shape (B, C, H, W), strided as they may be; float32, bfloat16, float16 or float64.
        ecg: one value per sample and channel, (B, C), any floating type; constant over the map.
        weights: (B, 2), any floating type: w_mri and w_ecg of each sample.
        scale: FiLM's gamma, (B, C), any floating type.
        shift: FiLM's beta, (B, C), any floating type.

    Returns:
        Tensor of shape (B, C, H, W) in the type and, where features is dense, the memory layout of features, computed
        in float32 (float64 for float64 features).

    Raises:
        ShapeError: an argument has another shape, or lies on another device.
        TypeError: an argument is not floating point.

    Examples:
        >>> weights = torch.softmax(logits, dim=1)
        >>> fused = temporal_film_gate(features, ecg, weights, scale, shift)

    Source: temporal-aware feature fusion of TAFF-UNet; FiLM is Perez et al., 2018.
    """
    arguments = (features, ecg, weights, scale, shift)
    _check(*arguments)
    backend = library.choose_backend(OP, features)
    if backend == "reference":
        return temporal_film_gate_reference(*arguments)
    transformed = library.under_functional_transform(arguments)
    if backend == "triton" and not transformed:
        return _operator(*arguments)
    a, b = _coefficients(ecg, weights, scale, shift, torch.promote_types(features.dtype, torch.float32))
    if transformed or features.device.type != "cpu" or library.without_values(arguments):
        return _affine(features, a, b)
    return _ChannelAffine.apply(features, a, b)


def _check(features: Tensor, ecg: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> None:
    given = {"features": features, "ecg": ecg, "weights": weights, "scale": scale, "shift": shift}
    for name, value in given.items():
        library.check_dtype(OP, name, value)
    check_map(OP, "features", features)
    batch, channels = features.shape[:2]
    per_channel = ("(B, C)", (batch, channels))
    expected = {"ecg": per_channel, "weights": ("(B, 2)", (batch, 2)), "scale": per_channel, "shift": per_channel}
    library.check_shapes(OP, given, expected, features)
    library.check_same_device(OP, given)
