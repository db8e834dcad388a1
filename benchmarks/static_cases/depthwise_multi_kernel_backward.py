"""The gradients of the depthwise multi-kernel convolution's kernels as they are compiled for the gate."""

from __future__ import annotations

from typing import Any

from trifuse.kernels.gpu.depthwise_multi_kernel_backward import (
    BACKWARD_CHOICES,
    FEW_ENTRIES,
    ROWS_AT_ONCE,
    ROWS_AT_ONCE_RAGGED,
    SUMMED,
    _depthwise_multi_kernel_dw_kernel,
    _depthwise_multi_kernel_split_kernel,
)

from .case import StaticCase, Traffic, specialised
from .depthwise_multi_kernel import PAPER, walk_case

# each lane of four columns writes its sums, which are read once more
_SHARES = "8 * K**2 / (4 * H)"
TRAFFIC = [
    Traffic("backward", PAPER, "B * C * H * W", f"4 * e + {_SHARES}", "3 * e", {"multiply-adds": "2 * K**2"}),
]


def _gradient(dtype: str, form: int = 0, whole: bool = True, **options: Any) -> StaticCase:
    kernel, choice = _depthwise_multi_kernel_dw_kernel, BACKWARD_CHOICES[form]
    rows = ROWS_AT_ONCE if whole else ROWS_AT_ONCE_RAGGED
    options = {"parts": 1, "samples": 1, "entry_stride": 1, "ROWS": rows, "whole": whole, **options}
    return walk_case("kernel gradient", kernel, ("grad", "x"), choice, BACKWARD_CHOICES, dtype, **options)


_SPLIT = {"SIDES": (5, 7), "K": 7, "SHARES": SUMMED // FEW_ENTRIES, "ENTRIES": FEW_ENTRIES, "entry_stride": 1}
STATIC_CASES = [
    *(_gradient("bf16", form) for form in range(len(BACKWARD_CHOICES))),
    _gradient("bf16", whole=False),
    _gradient("fp32"),
    _gradient("bf16", channels_last=False),
    specialised(
        "shares",
        _depthwise_multi_kernel_split_kernel,
        {"shares": "*fp32", "weight_grads": ("*fp32", "*fp32")},
        _SPLIT,
        unaligned=("channels", "share_count", "share_stride"),
    ),
]
