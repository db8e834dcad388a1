"""Monte Carlo pooling's kernels as they are compiled for the gate, and what its passes move."""

from __future__ import annotations

from trifuse.kernels.gpu import tuning
from trifuse.kernels.gpu.maps import TILE_CHOICES
from trifuse.kernels.gpu.monte_carlo_pool import (
    MARK_PIXELS,
    MOST_STEPS,
    _monte_carlo_pool_bwd_kernel,
    _monte_carlo_pool_fwd_kernel,
    _monte_carlo_pool_mark_kernel,
)

from .case import StaticCase, Traffic, in_form, in_units, specialised

_PAPER = {"B": 16, "C": 256, "H": 64, "W": 64, "scale": 2, "e": 2}
TRAFFIC = [
    Traffic("forward", _PAPER, "B * C * H * W", "e / scale**2", "e / scale**2"),
    Traffic("backward", _PAPER, "B * C * H * W", "e", "e"),
]


def _case(name: str, kernel, constants: dict, absent: tuple[str, ...], dtype: str) -> StaticCase:
    """Specialise a kernel as its launcher does for maps of 64 x 64 positions and 64 or 72 channels."""
    pointers = {"x": dtype, "x_grad": dtype, "grad": dtype, "target": "fp32", "chosen": "u8"}
    pointers |= dict.fromkeys(("scales", "cells", "permutation"), "i64")
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()}
    unaligned = ("scale", "cell", "splits", "scale_stride", "cell_stride", *in_units(kernel, constants))
    return specialised(f"{name}, {dtype}", kernel, kinds, {**constants, **dict.fromkeys(absent)}, unaligned)


_PLANES = {"CHANNELS": 1, "PIXELS": 1024, "UNIT": 1, "x_stride_w": 1, "x_grad_stride_w": 1}
_CHANNELS_LAST = {"CHANNELS": 64, "PIXELS": 16, "UNIT": 8, "x_stride_c": 1, "x_grad_stride_c": 1, "grad_stride_c": 1}
_OF_72 = _CHANNELS_LAST | {"CHANNELS": 16, "PIXELS": 64}
_NUMBERS = ("scales", "cells")


def _wide(choice: tuning.Choice) -> dict[str, int]:
    return {**_PLANES, "PIXELS": choice["tiles"] * _PLANES["PIXELS"]}


def _forward_case(name: str, layout: dict, absent: tuple[str, ...], dtype: str) -> StaticCase:
    constants = {name: value for name, value in layout.items() if "grad" not in name}
    return _case(f"forward, {name}", _monte_carlo_pool_fwd_kernel, {**constants, "FLAT": True}, absent, dtype)


def _backward_case(name: str, layout: dict, absent: tuple[str, ...], dtype: str) -> StaticCase:
    constants = {name: value for name, value in layout.items() if not name.startswith("x_stride")}
    constants["STEPS"] = MOST_STEPS if "steps" in name else 1
    return _case(f"backward, {name}", _monte_carlo_pool_bwd_kernel, constants, absent, dtype)


STATIC_CASES = [
    _forward_case("planes, permuted", _PLANES, (), "bf16"),
    _forward_case("planes, a draw in numbers", _PLANES, (*_NUMBERS, "permutation"), "fp32"),
    _forward_case("channels last, permuted", _CHANNELS_LAST, (), "bf16"),
    _forward_case("72 channels last, permuted", _OF_72, (), "bf16"),
    _backward_case("planes, permuted", _PLANES, (), "bf16"),
    _backward_case("planes, a draw in numbers", _PLANES, (*_NUMBERS, "chosen"), "fp32"),
    _backward_case("channels last, permuted", _CHANNELS_LAST, (), "bf16"),
    _backward_case("eight steps, 72 channels last, permuted", _OF_72, (), "bf16"),
    *(_forward_case(in_form("planes, permuted", c, TILE_CHOICES), _wide(c), (), "bf16") for c in TILE_CHOICES[1:]),
    *(_backward_case(in_form("planes, permuted", c, TILE_CHOICES), _wide(c), (), "bf16") for c in TILE_CHOICES[1:]),
    _case("marks", _monte_carlo_pool_mark_kernel, {"PIXELS": MARK_PIXELS}, (), "bf16"),
]
