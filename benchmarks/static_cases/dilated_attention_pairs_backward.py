"""The gradient of dilated attention for pairs of pixels as it is compiled for the gate, and what it moves."""

from __future__ import annotations

from trifuse.kernels.gpu.dilated_attention import CHOICES
from trifuse.kernels.gpu.dilated_attention_pairs_backward import (
    _dilated_attention_dkdv_pairs_kernel,
    _dilated_attention_dq_pairs_kernel,
)

from .case import Traffic
from .dilated_attention import PAPER
from .dilated_attention_pairs import pairs_case

# Nine maps; the denominators and, twice, the units; all taps of a query, and those of them that lie in the image.
_INSIDE = " + ".join(f"(3 - {2 * dilation} / H) * (3 - {2 * dilation} / W)" for dilation in (1, 2, 3))
_MOVED = f"9 * e + 4 * (12 * heads + {_INSIDE}) / C"
TRAFFIC = [Traffic("backward", PAPER, "B * H * W * C", _MOVED, "7 * e")]
STATIC_CASES = [
    case
    for choice in CHOICES
    for case in (
        pairs_case("dq", _dilated_attention_dq_pairs_kernel, "out q k v q", choice),
        pairs_case("dkdv", _dilated_attention_dkdv_pairs_kernel, "out q k v", choice),
    )
]
