"""The forward kernel of the residual sum and its layer norm, as compiled for the gate of costs, and what it moves."""

from __future__ import annotations

from typing import Any

from trifuse.kernels.gpu.maps import THREADS
from trifuse.kernels.gpu.residual_layer_norm import (
    ELEMENTS_PER_THREAD,
    MOST_THREADS,
    MOST_UNIT,
    TILE,
    _residual_layer_norm_fwd_kernel,
)

from .case import StaticCase, Traffic, in_units, specialised

DINO = {"B": 32, "M": 1025, "C": 768, "e": 2}
TRAFFIC = [
    Traffic("forward", DINO, "B * M * C", "4 * e", "4 * e"),
    Traffic("forward, nothing added", DINO, "B * M * C", "2 * e", "2 * e"),
]

STREAMS = ("x", "total", "total_grad", "x_grad")  # in the type of the residual
BRANCHES = ("branch", "normalised", "grad", "branch_grad")  # in that of the matrix products
_OTHERS = ("weight", "bias", "layer_scale", "sample_scale", "means", "rstds", "sums")
WIDTHS = {72: 128, 384: 512, 768: 1024, 1536: 2048}  # channels, and those of a tile


def token_case(
    name: str, kernel: Any, width: int, stream: str, branch: str, absent: tuple[str, ...] = (), affine: str = "fp32"
) -> StaticCase:
    """Specialise a kernel as its launcher does for dense tokens of so many channels, without what is absent."""
    kinds: dict[str, Any] = dict.fromkeys(STREAMS, f"*{stream}") | dict.fromkeys(BRANCHES, f"*{branch}")
    kinds |= dict.fromkeys(_OTHERS, "*fp32") | dict.fromkeys(("weight", "bias", "layer_scale"), f"*{affine}")
    kinds |= {"eps": "fp32"}
    if "branch" in absent and "total" in absent:
        kinds["x"] = f"*{stream}"
    tile = WIDTHS[width]
    switches: dict[Any, object] = {"TOKENS": max(1, TILE // tile), "CHANNELS": tile, "UNIT": MOST_UNIT}
    switches |= dict.fromkeys(absent)
    kinds |= {name: ("i32", "i32") for name in kernel.arg_names if name.endswith("_strides")}
    unaligned = ("count", "tokens", "eps", *in_units(kernel, switches))
    threads = min(MOST_THREADS, max(THREADS, tile // ELEMENTS_PER_THREAD))
    return specialised(
        f"{name}, {width} channels, {described(stream, branch)}", kernel, kinds, switches, unaligned, threads
    )


def described(stream: str, branch: str) -> str:
    """Return the types of the residual and of the branch in words."""
    return stream if stream == branch else f"{stream} and {branch}"


def forward_case(
    name: str, width: int, stream: str, branch: str, absent: tuple[str, ...], affine: str = "fp32"
) -> StaticCase:
    return token_case(name, _residual_layer_norm_fwd_kernel, width, stream, branch, absent, affine)


LAYER_SCALE, PLAIN, NORM = ("sample_scale",), ("layer_scale", "sample_scale"), ("branch", "layer_scale", "sample_scale")
STATIC_CASES = [
    *(forward_case("forward, layer scale", width, "bf16", "bf16", LAYER_SCALE, "bf16") for width in (384, 768, 1536)),
    *(forward_case("forward, layer scale", width, "fp32", "bf16", LAYER_SCALE) for width in (768, 1536)),
    forward_case("forward, layer scale", 768, "fp32", "fp32", LAYER_SCALE),
    forward_case("forward", 72, "bf16", "bf16", PLAIN, "bf16"),
    forward_case("forward, sample scale", 72, "fp32", "bf16", ("layer_scale",)),
    forward_case("forward, nothing added", 768, "bf16", "bf16", NORM, "bf16"),
    forward_case("forward, nothing added", 72, "fp32", "bf16", NORM),
]
