"""A map multiplied by the sigmoid of a gate: one gate for each channel, or one for each position.

    channel_gate    gated[b, c, h, w] = x[b, c, h, w] * sigmoid(gate[b, c])
    spatial_gate    gated[b, c, h, w] = x[b, c, h, w] * sigmoid(gate[b, 0, h, w])

    d gated / d x:     grad * s,                                                  s = sigmoid(gate)
    d gated / d gate:  s (1 - s) * (sum of grad * x over what the gate is shared by)

Sources: Hu et al., Squeeze-and-Excitation Networks, Eq. 4, for the channels; FIAS, equation 6, for the positions.

What fusing saves: the gate reads the map once and writes it once; backward reads the gradient and the map once for
both gradients, where autograd writes their product as a map. Nothing but the arguments is saved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trifuse.kernels import library
from trifuse.kernels.cpu.channel_sums import channel_sums
from trifuse.kernels.differentiation import once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.torch_internals import below_autograd

CHANNEL_GATE = "channel_gate"
SPATIAL_GATE = "spatial_gate"
# Products of a map and a gradient that stay in a core's cache until they are added up.
CHUNK_ELEMENTS = 1 << 18


def channel_gate_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Define `channel_gate`: multiply each channel by the sigmoid of its gate."""
    return _gated(x, gate[:, :, None, None])


def spatial_gate_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Define `spatial_gate`: multiply each position by the sigmoid of its gate."""
    return _gated(x, gate)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply a map by the sigmoid of a broadcasting gate, in float32 or wider, and return the map's type."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute_dtype) * torch.sigmoid(gate.to(compute_dtype))).to(x.dtype)


# -------------------------------------------------------------------------------------------------------- plain PyTorch


class _EagerGate(torch.autograd.Function):
    """The CPU path with its own backward: autograd would keep a float32 copy of a map of lower precision."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate, *((x,) if gate.requires_grad else ()))
        return _gated(x, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, *saved = ctx.saved_tensors
        compute_dtype = torch.promote_types(grad.dtype, torch.float32)
        s = torch.sigmoid(gate.to(compute_dtype))
        x_grad = (grad.to(compute_dtype) * s).to(grad.dtype) if ctx.needs_input_grad[0] else None
        if not saved:
            return x_grad, None
        sums = _products_summed(grad, saved[0], gate.shape, compute_dtype)
        return x_grad, torch.ops.aten.sigmoid_backward(sums, s).to(gate.dtype)


def _products_summed(grad: Tensor, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the sum of ``grad * x`` over what a gate of ``shape``, (B, C, 1, 1) or (B, 1, H, W), is shared by."""
    if shape[1:] == (x.shape[1], 1, 1):  # a single position has a gate (B, 1, 1, 1), which is not of the channels
        return channel_sums(grad, x, dtype)[0].view(shape)
    sums = torch.empty(shape, dtype=dtype)
    samples = len(x) if x.numel() <= CHUNK_ELEMENTS else max(1, CHUNK_ELEMENTS // x[0].numel())
    for g, part, total in zip(*(t.split(samples) for t in (grad, x, sums)), strict=True):
        torch.sum(g.to(dtype) * part.to(dtype), dim=1, keepdim=True, out=total)
    return sums


# --------------------------------------------------------------------------------------------- the registered operators


def _register(op: str) -> None:
    """Register ``op(x, gate)`` and its backward, which returns the gate's gradient and, if asked, the map's."""

    class TritonGate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, gate: Tensor) -> Tensor:
            ctx.save_for_backward(gate, *((x,) if gate.requires_grad else ()))
            with below_autograd():
                return getattr(torch.ops.trifuse, op)(x, gate)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
            gate, *saved = ctx.saved_tensors
            needs_x = ctx.needs_input_grad[0]
            if not saved:  # the map's gradient is the incoming one, gated
                return getattr(torch.ops.trifuse, op)(grad, gate), None
            gate_grad, x_grads = getattr(torch.ops.trifuse, f"{op}_backward")(grad, saved[0], gate, needs_x)
            return x_grads[0] if needs_x else None, gate_grad

    def launch_forward(x: Tensor, gate: Tensor) -> Tensor:
        from trifuse.kernels.gpu import gates

        return gates.gate_forward(x, gate)

    def launch_backward(grad: Tensor, x: Tensor, gate: Tensor, needs_x: bool) -> tuple[Tensor, list[Tensor]]:
        from trifuse.kernels.gpu import gates

        return getattr(gates, f"{op}_backward")(grad, x, gate, needs_x)

    def shape_backward(grad: Tensor, x: Tensor, gate: Tensor, needs_x: bool) -> tuple[Tensor, list[Tensor]]:
        return gate.new_empty(gate.shape), [torch.empty_like(x)] if needs_x else []

    library.register(
        f"{op}(Tensor x, Tensor gate) -> Tensor",
        launch_forward,
        lambda x, gate: torch.empty_like(x),
        lambda x, gate: TritonGate.apply(x, gate),
    )
    library.register(
        f"{op}_backward(Tensor grad, Tensor x, Tensor gate, bool needs_x) -> (Tensor, Tensor[])",
        launch_backward,
        shape_backward,
    )


_register(CHANNEL_GATE)
_register(SPATIAL_GATE)


# ------------------------------------------------------------------------------------------------------ the public face


def channel_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every channel by the sigmoid of its gate: (B, C, H, W), (B, C) -> (B, C, H, W).

    The result and both gradients are deterministic on every backend. The Triton and CPU paths can be differentiated
    once; a second differentiation raises.

    Args:
        x: maps of shape (B, C, H, W), strided as they may be; float32, bfloat16, float16 or float64.
        gate: tensor of shape (B, C), any floating type, before the sigmoid, which is computed in float32 or wider.

    Returns:
        Tensor of shape (B, C, H, W) in the type and, where x is dense, the memory layout of x.

    Raises:
        ShapeError: x is not (B, C, H, W), or the gate not (B, C), or they lie on different devices.
        TypeError: one of them is not floating point.

    Source: Hu et al., Squeeze-and-Excitation Networks, Eq. 4.
    """
    _check(CHANNEL_GATE, x, gate, lambda shape: tuple(shape[:2]), "(B, C)")
    if library.choose_backend(CHANNEL_GATE, x) == "reference":
        return channel_gate_reference(x, gate)
    return _apply(CHANNEL_GATE, x, gate, gate[:, :, None, None])


def spatial_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every position by the sigmoid of its gate: (B, C, H, W), (B, 1, H, W) -> (B, C, H, W).

    The result and both gradients are deterministic on every backend. The Triton and CPU paths can be differentiated
    once; a second differentiation raises.

    Args:
        x: maps of shape (B, C, H, W), strided as they may be; float32, bfloat16, float16 or float64.
        gate: tensor of shape (B, 1, H, W), any floating type, before the sigmoid, which is computed in float32 or
            wider.

    Returns:
        Tensor of shape (B, C, H, W) in the type and, where x is dense, the memory layout of x.

    Raises:
        ShapeError: x is not (B, C, H, W), or the gate not (B, 1, H, W), or they lie on different devices.
        TypeError: one of them is not floating point.

    Source: FIAS, equation 6.
    """
    _check(SPATIAL_GATE, x, gate, lambda shape: (shape[0], 1, *shape[2:]), "(B, 1, H, W)")
    if library.choose_backend(SPATIAL_GATE, x) == "reference":
        return spatial_gate_reference(x, gate)
    return _apply(SPATIAL_GATE, x, gate, gate)


def _check(op: str, x: Tensor, gate: Tensor, expected: Callable[[torch.Size], tuple[int, ...]], letters: str) -> None:
    """Refuse a map that is not (B, C, H, W), and a gate that is not of the shape ``expected`` of it."""
    library.check_dtype(op, "x", x)
    library.check_dtype(op, "gate", gate)
    if x.ndim != 4:
        raise ShapeError(f"{op}: x has shape {tuple(x.shape)}; expected (B, C, H, W); add what is missing with x[None]")
    if gate.shape != expected(x.shape):
        raise ShapeError(
            f"{op}: gate has shape {tuple(gate.shape)}; expected {letters} = {expected(x.shape)} for x of shape "
            f"{tuple(x.shape)}; reshape it"
        )
    library.check_same_device(op, {"x": x, "gate": gate})


@library.falls_back
def _apply(op: str, x: Tensor, gate: Tensor, broadcast: Tensor) -> Tensor:
    """Run a checked gate on the backend of choice, the reference aside; ``broadcast`` is the gate, broadcasting."""
    if library.under_functional_transform((x, gate)):
        return _gated(x, broadcast)
    if library.choose_backend(op, x) == "triton":
        return getattr(torch.ops.trifuse, op)(x, gate)
    if x.device.type != "cpu" or library.without_values((x, gate)):
        return _gated(x, broadcast)
    if not (torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad)):
        return _gated(x, broadcast)
    return _EagerGate.apply(x, broadcast)
