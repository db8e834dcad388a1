"""What the two gates share: a map multiplied by the sigmoid of a gate, one per channel or one per position.

    gated = x * s,  s = sigmoid(gate)
    d gated / d x:     grad * s
    d gated / d gate:  s (1 - s) * (sum of grad * x over what the gate is shared by)

Gates of both kinds come here in the shape that broadcasts: (B, C, 1, 1) or (B, 1, H, W).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trifuse.kernels import library
from trifuse.kernels.cpu.channel_sums import channel_sums
from trifuse.kernels.errors import ShapeError

# Products of a map and a gradient that stay in a core's cache until they are added up.
CHUNK_ELEMENTS = 1 << 18


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply a map by the sigmoid of a broadcasting gate, in float32 or wider, and return the map's type."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute_dtype) * torch.sigmoid(gate.to(compute_dtype))).to(x.dtype)


class _EagerGate(torch.autograd.Function):
    """The CPU path with its own backward: autograd would keep a float32 copy of a map of lower precision."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate, *((x,) if gate.requires_grad else ()))
        return gated(x, gate)

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


def register_gate(op: str) -> None:
    """Register ``op(x, gate)`` and its backward, which returns the gate's gradient and, if asked, the map's."""

    class TritonGate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, gate: Tensor) -> Tensor:
            ctx.save_for_backward(gate, *((x,) if gate.requires_grad else ()))
            with torch._C._AutoDispatchBelowAutograd():
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


def check_gate(
    op: str, x: Tensor, gate: Tensor, expected: Callable[[torch.Size], tuple[int, ...]], letters: str
) -> None:
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
def apply_gate(op: str, x: Tensor, gate: Tensor, broadcast: Tensor) -> Tensor:
    """Run a checked gate on the backend of choice, the reference aside; ``broadcast`` is the gate, broadcasting."""
    if library.under_functional_transform((x, gate)):
        return gated(x, broadcast)
    if library.choose_backend(op, x) == "triton":
        return getattr(torch.ops.trifuse, op)(x, gate)
    if x.device.type != "cpu" or library.without_values((x, gate)):
        return gated(x, broadcast)
    if not (torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad)):
        return gated(x, broadcast)
    return _EagerGate.apply(x, broadcast)
