"""Context-aware fusion's passes over a map: every position weighed by its gate, and pooling that leaves nothing behind.

    gated[b, c, h, w] = x[b, c, h, w] * sigmoid(gate[b, 0, h, w])

    d gated / d x:     grad * s,                            s = sigmoid(gate)
    d gated / d gate:  s (1 - s) * sum_c grad * x

Source: FIAS, equations 3 to 6.

What fusing saves: the gate reads the map once and writes it once; backward reads the gradient and the map once for
both gradients, and nothing but the arguments is saved.
"""

from __future__ import annotations

from torch import Tensor

from . import _library
from ._gates import apply_gate, check_gate, gated, register_gate

GATE = "spatial_gate"


def spatial_gate_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Define `spatial_gate`: multiply each position by the sigmoid of its gate."""
    return gated(x, gate)


register_gate(GATE)


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
    check_gate(GATE, x, gate, lambda shape: (shape[0], 1, *shape[2:]), "(B, 1, H, W)")
    if _library.choose_backend(GATE, x) == "reference":
        return spatial_gate_reference(x, gate)
    return apply_gate(GATE, x, gate, gate)
