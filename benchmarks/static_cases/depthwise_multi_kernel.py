"""The depthwise multi-kernel convolution's kernels as they are compiled for the gate, and what its passes move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trifuse.kernels.gpu.depthwise_multi_kernel import (
    FORWARD_CHOICES,
    LANES,
    MERGE_CHANNELS,
    _depthwise_multi_kernel_fwd_kernel,
    _merge_kernel,
)

from .case import StaticCase, Traffic, in_form, specialised

PAPER = {"B": 32, "C": 72, "H": 64, "W": 64, "K": 7, "e": 2}
TRAFFIC = [Traffic("forward", PAPER, "B * C * H * W", "2 * e", "2 * e", {"multiply-adds": "K**2"})]

CHANNELS = 72


def walk_case(
    name: str,
    kernel: Any,
    maps: tuple[str, str],
    choice: Mapping[str, int],
    choices: Sequence[Mapping[str, int]],
    dtype: str,
    *,
    channels_last: bool = True,
    whole: bool = True,
    **constants: object,
) -> StaticCase:
    """Compile a walk down the columns of two maps for a merged kernel of 7, with channels or columns innermost."""
    names, step = kernel.arg_names, CHANNELS if channels_last else 1
    one = 1 if channels_last else 3  # the stride of the innermost dimension
    strides = tuple("constexpr" if place == one else "i32" for place in range(4))
    kinds: dict[str, Any] = dict.fromkeys(maps, f"*{dtype}") | {"merged": "*fp32", "shares": "*fp32"}
    kinds |= {key: strides for key in names if key.endswith("_strides")}
    fixed: dict[Any, object] = {f"{key.upper()}_STEP": step for key in maps}
    fixed |= {"CHANNELS_INNERMOST": channels_last, "WHOLE": whole, "K": 7, "COLUMNS": choice["columns"], "LANES": LANES}
    fixed |= {(names.index(key), one): 1 for key in kinds if key.endswith("_strides")}
    layout = f"{CHANNELS} channels" if channels_last else "columns"
    name = f"{name}, {layout} innermost, {'' if whole else 'ragged, '}{dtype}"
    unaligned = set(names) - {*maps, "merged", "shares"}
    return specialised(in_form(name, choice, choices), kernel, kinds, fixed | constants, unaligned, LANES)


def _forward(dtype: str, form: int = 0, **options: Any) -> StaticCase:
    kernel, choice = _depthwise_multi_kernel_fwd_kernel, FORWARD_CHOICES[form]
    options = {"parts": 1, "FLIPPED": False, **options}
    return walk_case("convolution", kernel, ("x", "out"), choice, FORWARD_CHOICES, dtype, **options)


_MERGED: dict[Any, object] = {"SIDES": (5, 7), "K": 7, "RESIDUAL": True, "TAPS": 64, "CHANNELS": MERGE_CHANNELS}
STATIC_CASES = [
    *(_forward("bf16", form) for form in range(len(FORWARD_CHOICES))),
    _forward("bf16", whole=False),
    _forward("fp32"),
    _forward("bf16", channels_last=False),
    specialised(
        "merge", _merge_kernel, {"weights": ("*fp32", "*fp32"), "merged": "*fp32"}, _MERGED, unaligned=("channels",)
    ),
]
