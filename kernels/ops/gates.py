"""A map multiplied by the sigmoid of a gate: one gate for each channel, or one for each position.

    channel_gate    gated[b, c, h, w] = x[b, c, h, w] * sigmoid(gate[b, c])
    spatial_gate    gated[b, c, h, w] = x[b, c, h, w] * sigmoid(gate[b, 0, h, w])

    d gated / d x:     grad * s,                                                  s = sigmoid(gate)
    d gated / d gate:  s (1 - s) * (sum of grad * x over what the gate is shared by)

Sources: Hu et al., Squeeze-and-Excitation Networks, Eq. 4, for the channels; FIAS, equation 6, for the positions.

What fusing saves: the gate reads the map once and writes it once; backward reads the gradient and the map once for
both gradients, where autograd writes their product as a map. Nothing but the arguments is saved. Small maps of a CPU
leave it nothing to save: there the gate is PyTorch's own sigmoid and product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trifuse.kernels import library
from trifuse.kernels.cpu.channel_sums import channel_sums
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.torch_internals import below_autograd

from ._map_shape import check_map

CHANNEL_GATE = "channel_gate"
SPATIAL_GATE = "spatial_gate"
# Products of a map and a gradient that stay in a core's cache until they are added up.
CHUNK_ELEMENTS = 1 << 18
# Of fewer, in float32 or wider, the product that autograd makes stays in a cache as well, and takes fewer steps.
FEWEST_ELEMENTS = 1 << 20
WIDE = (torch.float32, torch.float64)


def channel_gate_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Define `channel_gate`: multiply each channel by the sigmoid of its gate."""
    return _gated(x, gate)


def spatial_gate_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Define `spatial_gate`: multiply each position by the sigmoid of its gate."""
    return _gated(x, gate)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply a map by the sigmoid of a gate (B, C) or (B, 1, H, W), in float32 or wider; return the map's type."""
    if x.dtype not in WIDE or gate.dtype != x.dtype:  # conversions to the same type would take a third of a small gate
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        return _gated(x.to(compute_dtype), gate.to(compute_dtype)).to(x.dtype)
    return x * _broadcast(torch.sigmoid(gate))


def _broadcast(gate: Tensor) -> Tensor:
    """View a gate (B, C) or (B, 1, H, W) so that it is broadcast over a map."""
    return gate[:, :, None, None] if gate.ndim == 2 else gate


# -------------------------------------------------------------------------------------------------------- plain PyTorch


class _EagerGate(Function):
    """The gate with a backward of its own: autograd would make a product map, and keep a wider copy of a narrow map."""

    @staticmethod
    def forward(ctx: ForwardContext, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate, *((x,) if gate.requires_grad else ()))
        return _gated(x, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, *saved = ctx.saved_tensors
        compute_dtype = torch.promote_types(grad.dtype, torch.float32)
        s = torch.sigmoid(gate.to(compute_dtype))
        x_grad = (grad.to(compute_dtype) * _broadcast(s)).to(grad.dtype) if ctx.needs_input_grad[0] else None
        if not saved:
            return x_grad, None
        sums = _products_summed(grad, saved[0], gate.shape, compute_dtype)
        return x_grad, torch.ops.aten.sigmoid_backward(sums, s).to(gate.dtype)


def _products_summed(grad: Tensor, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the sum of ``grad * x`` over what a gate of ``shape``, (B, C) or (B, 1, H, W), is shared by."""
    if len(shape) == 2:
        return channel_sums(grad, x, dtype)[0]
    sums = torch.empty(shape, dtype=dtype)
    samples = len(x) if x.numel() <= CHUNK_ELEMENTS else max(1, CHUNK_ELEMENTS // x[0].numel())
    for g, part, total in zip(*(t.split(samples) for t in (grad, x, sums)), strict=True):
        torch.sum(g.to(dtype) * part.to(dtype), dim=1, keepdim=True, out=total)
    return sums


# --------------------------------------------------------------------------------------------- the registered operators


def _register(op: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Register ``op(x, gate)``, which is returned, and its backward: the gate's gradient and, if asked, the map's."""

    class TritonGate(Function):
        @staticmethod
        def forward(ctx: ForwardContext, x: Tensor, gate: Tensor) -> Tensor:
            ctx.save_for_backward(gate, *((x,) if gate.requires_grad else ()))
            with below_autograd():
                gated: Tensor = getattr(torch.ops.trifuse, op)(x, gate)
                return gated

        @staticmethod
        @once_differentiable
        def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
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

        grads: tuple[Tensor, list[Tensor]] = getattr(gates, f"{op}_backward")(grad, x, gate, needs_x)
        return grads

    def shape_backward(grad: Tensor, x: Tensor, gate: Tensor, needs_x: bool) -> tuple[Tensor, list[Tensor]]:
        return gate.new_empty(gate.shape), [torch.empty_like(x)] if needs_x else []

    operator = library.register(
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
    return operator


_OPERATORS = {op: _register(op) for op in (CHANNEL_GATE, SPATIAL_GATE)}


# ------------------------------------------------------------------------------------------------------ the public face


def channel_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every channel by the sigmoid of its gate: (B, C, H, W), (B, C) -> (B, C, H, W).

    The result and both gradients are deterministic on every backend. The Triton path can be differentiated once, and so
    can maps on a CPU that are large, or of less than float32; a second differentiation raises.

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
    return _apply(CHANNEL_GATE, x, gate)


def spatial_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every position by the sigmoid of its gate: (B, C, H, W), (B, 1, H, W) -> (B, C, H, W).

    The result and both gradients are deterministic on every backend. The Triton path can be differentiated once, and so
    can maps on a CPU that are large, or of less than float32; a second differentiation raises.

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
    return _apply(SPATIAL_GATE, x, gate)


@library.falls_back
def _apply(op: str, x: Tensor, gate: Tensor) -> Tensor:
    _check(op, x, gate)
    backend = library.choose_backend(op, x)
    if backend == "triton" and not library.under_functional_transform((x, gate)):
        return _OPERATORS[op](x, gate)
    if backend == "torch" and _own_backward_pays(x, gate):
        return _EagerGate.apply(x, gate)
    return _gated(x, gate)


def _check(op: str, x: Tensor, gate: Tensor) -> None:
    library.check_dtype(op, "x", x)
    library.check_dtype(op, "gate", gate)
    shape = x.shape
    check_map(op, "x", x)
    expected = shape[:2] if op == CHANNEL_GATE else (shape[0], 1, *shape[2:])
    if gate.shape != expected:
        letters = "(B, C)" if op == CHANNEL_GATE else "(B, 1, H, W)"
        raise ShapeError(
            f"{op}: gate has shape {tuple(gate.shape)}; expected {letters} = {tuple(expected)} for x of shape "
            f"{tuple(shape)}; reshape it"
        )
    library.check_same_device(op, {"x": x, "gate": gate})


def _own_backward_pays(x: Tensor, gate: Tensor) -> bool:
    """Return whether plain PyTorch would spend more on a gate's gradients than `_EagerGate`, which is for a CPU."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad)):
        return False
    if x.device.type != "cpu" or (x.dtype in WIDE and x.numel() < FEWEST_ELEMENTS):
        return False
    return not (library.under_functional_transform((x, gate)) or library.without_values((x, gate)))
