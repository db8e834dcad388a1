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

# e for each of ten maps but k in the second launch; 4 for the denominators, and twice 36 for taps and 4 for units
TRAFFIC = [Traffic("backward", PAPER, "B * H * W * C", "9 * e + 84 * heads / C", "7 * e")]
STATIC_CASES = [
    case
    for choice in CHOICES
    for case in (
        pairs_case("dq", _dilated_attention_dq_pairs_kernel, "out q k v q", choice),
        pairs_case("dkdv", _dilated_attention_dkdv_pairs_kernel, "out q k v", choice),
    )
]
