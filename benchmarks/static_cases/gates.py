"""The gates' kernels as they are compiled for the gate of costs, and what their passes move."""

from __future__ import annotations

from trifuse.kernels.gpu.gates import (
    ADD_ROWS,
    SPATIAL_PIXELS,
    _add_parts_kernel,
    _channel_gate_bwd_kernel,
    _gate_fwd_kernel,
    _spatial_gate_bwd_kernel,
)
from trifuse.kernels.gpu.maps import (
    LEAST_CHANNELS,
    MOST_CHANNELS,
    TILE,
    TILE_CHOICES,
    TILES_SHARING,
)

from .case import StaticCase, Traffic, in_form, in_units, specialised

_PAPER = {"B": 16, "C": 256, "H": 64, "W": 64, "e": 2}
_MAPS_MOVED = {"forward": "2 * e", "backward": "3 * e"}
TRAFFIC = [Traffic(name, _PAPER, "B * C * H * W", moved, moved) for name, moved in _MAPS_MOVED.items()]

_PLANES = {"x_stride_w": 1, "gated_stride_w": 1, "grad_stride_w": 1, "x_grad_stride_w": 1}
_CHANNELS_LAST = {"x_stride_c": 1, "gated_stride_c": 1, "grad_stride_c": 1, "x_grad_stride_c": 1, "UNIT": 8}


def _case(name: str, kernel, tile: tuple[int, int], constants: dict, dtype: str, choice=TILE_CHOICES[0]) -> StaticCase:
    """Specialise a kernel as its launcher does for whole maps of 64 x 64 positions.

    There are 64 channels, or 72: a multiple of 16 bytes, but not of 16 elements.
    """
    kinds = dict.fromkeys(("x", "gated", "grad", "x_grad"), f"*{dtype}")
    kinds |= dict.fromkeys(("gate", "gate_grad", "target", "parts", "total"), "*fp32")
    tiles = {"CHANNELS": tile[0], "PIXELS": choice["tiles"] * tile[1], "FLAT": True, "UNIT": 1}
    name = in_form(name, choice, TILE_CHOICES)
    return specialised(f"{name}, {dtype}", kernel, kinds, tiles | constants, ("splits", *in_units(kernel, constants)))


_ROW, _POSITIONS, _COLUMN = (1, TILE), (TILE // SPATIAL_PIXELS, SPATIAL_PIXELS), (MOST_CHANNELS, TILE // MOST_CHANNELS)
_COLUMN_OF_72 = (LEAST_CHANNELS, TILE // LEAST_CHANNELS)
_CHANNELS = _PLANES | {"PER_CHANNEL": True}


def _columns(name: str, kernel, constants: dict, tiles: int = 1) -> list[StaticCase]:
    forms = {"channels last": _COLUMN, "72 channels last": _COLUMN_OF_72}
    return [
        _case(f"{name}, {form}", kernel, (channels, tiles * pixels), _CHANNELS_LAST | constants, "bf16")
        for form, (channels, pixels) in forms.items()
    ]


STATIC_CASES = [
    *(_case("forward, channels", _gate_fwd_kernel, _ROW, _CHANNELS, "bf16", choice) for choice in TILE_CHOICES),
    _case("forward, positions", _gate_fwd_kernel, _ROW, _PLANES | {"PER_CHANNEL": False}, "fp32"),
    *_columns("forward, two tiles", _gate_fwd_kernel, {"PER_CHANNEL": True}, TILES_SHARING),
    *_columns("forward, positions", _gate_fwd_kernel, {"PER_CHANNEL": False}),
    _case("backward, channels", _channel_gate_bwd_kernel, _ROW, _PLANES, "bf16"),
    _case("backward, channels", _channel_gate_bwd_kernel, _ROW, _PLANES, "fp32"),
    *_columns("backward", _channel_gate_bwd_kernel, {}),
    *(_case("backward, positions", _spatial_gate_bwd_kernel, _POSITIONS, _PLANES, "bf16", c) for c in TILE_CHOICES),
    _case("backward, positions", _spatial_gate_bwd_kernel, _POSITIONS, _PLANES, "fp32"),
    *_columns("backward, positions", _spatial_gate_bwd_kernel, {}),
    _case("parts added", _add_parts_kernel, (1, 1), {"ROWS": ADD_ROWS}, "fp32"),
]
