"""The temporal FiLM gate's kernels as they are compiled for the gate of costs, and what its passes move."""

from __future__ import annotations

from trifuse.kernels.gpu.maps import TILE_CHOICES, TILES_SHARING
from trifuse.kernels.gpu.temporal_film_gate import (
    CHANNELS_AT_ONCE,
    _temporal_film_bwd_kernel,
    _temporal_film_fwd_kernel,
    _temporal_film_small_bwd_kernel,
)

from .case import StaticCase, Traffic, in_form, in_units, specialised

_PAPER = {"B": 32, "C": 256, "H": 32, "W": 32, "e": 2}
TRAFFIC = [
    Traffic("forward", _PAPER, "B * C * H * W", "2 * e", "2 * e"),
    Traffic("backward", _PAPER, "B * C * H * W", "3 * e", "3 * e"),
]

_MAPS = ("features", "out", "grad", "features_grad")
_PLANES = {f"{name}_stride_w": 1 for name in _MAPS}
_CHANNELS_LAST = {"UNIT": 8, **{f"{name}_stride_c": 1 for name in _MAPS}}
_DENSE = {"ecg_stride_c": 1, "scale_stride_c": 1, "shift_stride_c": 1, "weights_stride_k": 1}
_ROW, _COLUMNS = (1, 1024), {"channels last": (64, 16), "72 channels last": (16, 64)}  # tiles of 64 x 64 positions


def _case(name: str, kernel, tile: tuple[int, int], constants: dict, dtype: str, choice=TILE_CHOICES[0]) -> StaticCase:
    """Specialise a kernel as its launcher does for maps of 64 x 64 positions and 64 or 72 channels."""
    pointers = ("ecg", "weights", "scale", "shift", "sums", "ecg_grad", "weights_grad", "scale_grad", "shift_grad")
    kinds = dict.fromkeys(_MAPS, f"*{dtype}") | dict.fromkeys(pointers, "*fp32")
    tiles = {"CHANNELS": tile[0], "PIXELS": choice["tiles"] * tile[1], "FLAT": True, "UNIT": 1}
    name = in_form(name, choice, TILE_CHOICES)
    unaligned = ("splits", "weights_stride_b", *in_units(kernel, constants))
    return specialised(f"{name}, {dtype}", kernel, kinds, tiles | constants | _DENSE, unaligned)


_ONLY_THE_MAP = {"features": None}
_ONLY_THE_REST = {"features_grad": None}
STATIC_CASES = [
    _case("forward", _temporal_film_fwd_kernel, _ROW, _PLANES, "bf16"),
    _case("forward", _temporal_film_fwd_kernel, _ROW, _PLANES, "fp32"),
    *(
        _case(
            f"forward, two tiles, {name}",
            _temporal_film_fwd_kernel,
            (channels, TILES_SHARING * pixels),
            _CHANNELS_LAST,
            "bf16",
        )
        for name, (channels, pixels) in _COLUMNS.items()
    ),
    _case("backward", _temporal_film_bwd_kernel, _ROW, _PLANES, "bf16"),
    _case("backward", _temporal_film_bwd_kernel, _ROW, _PLANES, "fp32"),
    *(
        _case(f"backward, {name}", _temporal_film_bwd_kernel, tile, _CHANNELS_LAST, "bf16")
        for name, tile in _COLUMNS.items()
    ),
    _case("backward of the map", _temporal_film_bwd_kernel, _ROW, _PLANES | _ONLY_THE_MAP, "bf16"),
    _case("backward of the rest", _temporal_film_bwd_kernel, _ROW, _PLANES | _ONLY_THE_REST, "bf16"),
    *(_case("forward", _temporal_film_fwd_kernel, _ROW, _PLANES, "bf16", choice) for choice in TILE_CHOICES[1:]),
    _case("gradients from the sums", _temporal_film_small_bwd_kernel, (CHANNELS_AT_ONCE, 0), {}, "fp32"),
]
