"""The depthwise multi-kernel convolution's kernels of wide merged kernels, as they are compiled for the gate."""

from __future__ import annotations

from trifuse.kernels.gpu.depthwise_multi_kernel_wide import (
    COLUMNS,
    TAPS,
    _wide_convolution_kernel,
    _wide_gradient_kernel,
)

from .case import Traffic
from .depthwise_multi_kernel import PAPER, walk_case

_WIDE = {**PAPER, "K": 13, "samples": 16}
# each lane of four columns writes its sums over some samples, which are read once more
_SHARES = "8 * K**2 / (4 * H * samples)"
TRAFFIC = [
    Traffic("forward", _WIDE, "B * C * H * W", "2 * e", "2 * e", {"multiply-adds": "K**2"}),
    Traffic("backward", _WIDE, "B * C * H * W", f"4 * e + {_SHARES}", "3 * e", {"multiply-adds": "2 * K**2"}),
]

_FORM = {"columns": COLUMNS}
STATIC_CASES = [
    walk_case(name, kernel, maps, _FORM, (_FORM,), "bf16", channels_last=channels_last, TAPS=TAPS, **constants)
    for name, kernel, maps, constants in (
        ("convolution", _wide_convolution_kernel, ("x", "out"), {"FLIPPED": False}),
        ("kernel gradient", _wide_gradient_kernel, ("grad", "x"), {"samples": 1, "entry_stride": 1}),
    )
    for channels_last in (True, False)
]
