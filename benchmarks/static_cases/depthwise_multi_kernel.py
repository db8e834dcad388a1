"""The depthwise multi-kernel convolution's kernels as they are compiled for the gate, and what its passes move."""

from __future__ import annotations

from typing import Any

from trifuse.kernels.gpu.depthwise_multi_kernel import (
    BACKWARD_CHOICES,
    FORWARD_CHOICES,
    MAX_SHARES,
    MERGE_CHANNELS,
    _depthwise_multi_kernel_dw_kernel,
    _depthwise_multi_kernel_fwd_kernel,
    _depthwise_multi_kernel_split_kernel,
    _merge_kernel,
    _tile,
)

from .case import StaticCase, Traffic, in_form, specialised

_PAPER = {"B": 32, "C": 72, "H": 64, "W": 64, "K": 7, "shares": MAX_SHARES, "e": 2}
_SHARES = "8 * shares * K**2 / (B * H * W)"
TRAFFIC = [
    Traffic("forward", _PAPER, "B * C * H * W", "2 * e", "2 * e", {"multiply-adds": "K**2"}),
    Traffic("backward", _PAPER, "B * C * H * W", f"4 * e + {_SHARES}", "3 * e", {"multiply-adds": "2 * K**2"}),
]

_UNITS = {"bf16": 8, "fp32": 4}


def _map_case(name: str, kernel, pointers, choices, dtype: str, channels_last: bool, form: int = 0) -> StaticCase:
    """Compile for maps of 64 columns or more and kernels of 7, with channels or columns innermost."""
    names = kernel.arg_names
    one = 1 if channels_last else 3  # the stride of the innermost dimension
    strides = tuple("constexpr" if place == one else "i32" for place in range(4))
    constants: dict[Any, Any] = {"UNIT": _UNITS[dtype] if channels_last else 1, "K": 7}
    constants |= _tile(64, choices[form]["rows"])
    kinds: dict[str, Any] = {key: strides for key in names if key.endswith("_strides")}
    kinds.update(dict.fromkeys(pointers, f"*{dtype}"), merged="*fp32", shares="*fp32")
    name = in_form(f"{name}, {'channels' if channels_last else 'columns'} innermost, {dtype}", choices[form], choices)
    constants.update({(names.index(key), one): 1 for key in names if key.endswith("_strides")})
    return specialised(name, kernel, kinds, constants, unaligned=set(names) - set(pointers))


def _parts_case(name: str, kernel: Any, pointers: dict[str, str | tuple[str, ...]], **flags: bool) -> StaticCase:
    """Compile the merge of kernels of 5 and 7, or the split of their gradient."""
    constants: dict[Any, Any] = {"SIDES": (5, 7), "K": 7, "TAPS": 64, "CHANNELS": MERGE_CHANNELS, **flags}
    return specialised(name, kernel, pointers, constants, unaligned=("channels", "share_count"))


_FORWARD = ("convolution", _depthwise_multi_kernel_fwd_kernel, ("x", "merged", "out"), FORWARD_CHOICES)
_BACKWARD = ("kernel gradient", _depthwise_multi_kernel_dw_kernel, ("grad", "x", "shares"), BACKWARD_CHOICES)
_TWO = ("*fp32", "*fp32")
STATIC_CASES = [
    *(_map_case(*_FORWARD, "bf16", True, form) for form in range(len(FORWARD_CHOICES))),
    _map_case(*_FORWARD, "fp32", True),
    _map_case(*_FORWARD, "bf16", False),
    *(_map_case(*_BACKWARD, "bf16", True, form) for form in range(len(BACKWARD_CHOICES))),
    _map_case(*_BACKWARD, "fp32", True),
    _map_case(*_BACKWARD, "bf16", False),
    _parts_case("merge", _merge_kernel, {"weights": _TWO, "merged": "*fp32"}, RESIDUAL=True, FLIPPED=True),
    _parts_case("split", _depthwise_multi_kernel_split_kernel, {"shares": "*fp32", "weight_grads": _TWO}),
]
