"""The segmentation sums' backward kernels as they are compiled for the gate, and what the pass moves."""

from __future__ import annotations

from trifuse.kernels.gpu.segmentation_sums import STEPS
from trifuse.kernels.gpu.segmentation_sums_backward import (
    BACKWARD_CHOICES,
    FOLDED_BLOCKS,
    FOLDED_COLUMNS,
    SHARING,
    _fold_rows_kernel,
    _segmentation_sums_bwd_kernel,
)

from .case import StaticCase, Traffic
from .segmentation_sums import sums_case

_PAPER = {"B": 24, "K": 9, "H": 224, "W": 224, "N": 3, "e": 2}
_BOTH, _WORK = "2 * e + 8 / (N * K)", {"exponentials": "(2**N - 1) / N"}
TRAFFIC = [Traffic("backward", _PAPER, "B * K * H * W * N", _BOTH, _BOTH, _WORK)]


def _fold_case(maps: int, classes: int, dtype: str) -> StaticCase:
    each = ("folded", "heights", "widths")
    numbers = ("samples", "strips", "rows", "width")
    switches: dict[str | tuple[int, ...], object] = {
        "N": maps,
        "K": classes,
        "STEPS": STEPS,
        "BLOCKS": FOLDED_BLOCKS,
        "COLUMNS": FOLDED_COLUMNS,
        "SHARING": SHARING,
    }
    return StaticCase(
        name=f"fold rows of {maps} maps, {dtype}",
        kernel=_fold_rows_kernel,
        signature={
            "partials": ("*fp32",) * maps,
            "grads": (f"*{dtype}",) * maps,
            **dict.fromkeys(each, ("i32",) * maps),
            **dict.fromkeys(numbers, "i32"),
            **dict.fromkeys(map(str, switches), "constexpr"),
        },
        constants=switches,
        aligned=("partials", "grads"),
        threads=FOLDED_COLUMNS * SHARING,
    )


STATIC_CASES = [
    sums_case(_segmentation_sums_bwd_kernel, 1, 4, "fp32", coarse=False),
    sums_case(_segmentation_sums_bwd_kernel, 3, 9, "bf16", coarse=False),
    sums_case(_segmentation_sums_bwd_kernel, 3, 9, "fp32", coarse=True),
    *(sums_case(_segmentation_sums_bwd_kernel, 1, 4, "fp32", coarse=True, choice=c) for c in BACKWARD_CHOICES[1:]),
    _fold_case(3, 9, "fp32"),
]
