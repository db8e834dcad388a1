"""The backward kernels of the residual sum and its layer norm, as compiled for the gate of costs; what they move."""

from __future__ import annotations

from trifuse.kernels.gpu.residual_layer_norm_backward import (
    CHANNELS_AT_ONCE,
    MOST_PARTS,
    PARTS_AT_ONCE,
    _add_token_sums_kernel,
    _residual_layer_norm_bwd_kernel,
)

from .case import StaticCase, Traffic, specialised
from .residual_layer_norm import token_case

FIAS = {"B": 32, "M": 4096, "C": 72, "e": 2, "parts": MOST_PARTS}
_SUMS = "16 * parts / (B * M)"  # of weight and bias: written, and read to be added up
TRAFFIC = [
    Traffic("backward", FIAS, "B * M * C", f"4 * e + {_SUMS}", "4 * e"),
    Traffic("backward, branch apart", FIAS, "B * M * C", f"5 * e + {_SUMS}", "5 * e"),
]


def backward_case(name: str, width: int, stream: str, branch: str, absent: tuple[str, ...]) -> StaticCase:
    return token_case(name, _residual_layer_norm_bwd_kernel, width, stream, branch, absent)


SHARED = ("branch", "branch_grad", "layer_scale", "sample_scale")
STATIC_CASES = [
    *(backward_case("backward", width, "bf16", "bf16", SHARED) for width in (72, 384, 768, 1536)),
    backward_case("backward", 768, "fp32", "fp32", SHARED),
    backward_case("backward, branch apart", 72, "fp32", "bf16", ("branch", "layer_scale")),
    backward_case("backward, of x alone", 72, "fp32", "bf16", (*SHARED, "total_grad")),
    *(backward_case("backward, layer scale", width, "fp32", "bf16", ("sample_scale",)) for width in (768, 1536)),
    specialised(
        "gradients of weight and bias",
        _add_token_sums_kernel,
        dict.fromkeys(("sums", "weight_grad", "bias_grad", "layer_scale_grad"), "*fp32"),
        {"PARTS": PARTS_AT_ONCE, "CHANNELS": CHANNELS_AT_ONCE, "layer_scale_grad": None},
        ("parts", "channels"),
    ),
]
