"""The segment FiLM gate's forward kernel as it is compiled for the gate of costs, and what the pass moves."""

from __future__ import annotations

from typing import Any

from trifuse.kernels.gpu.maps import TILE_CHOICES, TILES_SHARING
from trifuse.kernels.gpu.segment_film_gate import PLANE_PIXELS, _segment_film_fwd_kernel

from .case import StaticCase, Traffic, in_form, in_units, specialised

PAPER = {"B": 32, "C": 256, "H": 32, "W": 32, "e": 2}
TRAFFIC = [Traffic("forward", PAPER, "B * C * H * W", "2 * e + 1 / C", "2 * e + 1 / C")]

_MAPS = ("features", "out", "grad", "features_grad")
_POINTERS = ("shared", "scores", "direction", "weights", "scale", "shift", "sums", "segment_sums")
_GRADS = ("shared_grad", "scores_grad", "direction_grad", "weights_grad", "scale_grad", "shift_grad")
# Tiles of 64 x 64 positions.
ROW, COLUMNS = (1024 // PLANE_PIXELS, PLANE_PIXELS), {"channels last": (64, 16), "72 channels last": (16, 64)}


def film_case(
    name: str,
    kernel: Any,
    dtype: str,
    *,
    tile: tuple[int, int] = (0, 0),
    channels_last: bool = False,
    constants: dict[Any, object] | None = None,
) -> StaticCase:
    """Specialise a kernel as its launcher does for maps of 64 x 64 positions, 64 or 72 channels, and 17 segments."""
    kinds: dict[str, Any] = dict.fromkeys(_MAPS, f"*{dtype}") | dict.fromkeys((*_POINTERS, *_GRADS), "*fp32")
    kinds["segments"] = "*u8"
    innermost = dict.fromkeys(_MAPS, 1 if channels_last else 3)
    innermost |= {"segments": 2, "shared": 1, "scores": 1, "direction": 1, "weights": 1, "scale": 1, "shift": 1}
    switches: dict[Any, object] = {
        "CHANNELS": tile[0],
        "PIXELS": tile[1],
        "FLAT": True,
        "UNIT": 8 if channels_last else 1,
        **(constants or {}),
    }
    for pointer, inner in innermost.items():
        if f"{pointer}_strides" in kernel.arg_names:
            length = 4 if pointer in _MAPS else 3 if pointer == "segments" else 2
            kinds[f"{pointer}_strides"] = tuple("constexpr" if i == inner else "i32" for i in range(length))
            switches[kernel.arg_names.index(f"{pointer}_strides"), inner] = 1
    unaligned = ("splits", "parts", "segment_parts", "count", "segment_rows", "weights_strides", "scores_strides")
    unaligned += in_units(kernel, switches)
    return specialised(f"{name}, {dtype}", kernel, kinds, switches, unaligned)


def _forward(dtype: str, tiles: int = 1) -> StaticCase:
    name = in_form("forward", {"tiles": tiles}, TILE_CHOICES)
    return film_case(name, _segment_film_fwd_kernel, dtype, tile=(tiles * ROW[0], ROW[1]))


def _columns(name: str) -> StaticCase:
    tile = (COLUMNS[name][0], TILES_SHARING * COLUMNS[name][1])
    return film_case(f"forward, two tiles, {name}", _segment_film_fwd_kernel, "bf16", tile=tile, channels_last=True)


STATIC_CASES = [
    _forward("bf16"),
    _forward("fp32"),
    *map(_columns, COLUMNS),
    *(_forward("bf16", choice["tiles"]) for choice in TILE_CHOICES[1:]),
]
