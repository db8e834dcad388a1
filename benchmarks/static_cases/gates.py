"""The gates' kernels as they are compiled for the gate of costs, and what their passes move."""

from __future__ import annotations

from trifuse.kernels.gpu.gates import (
    ADD_ROWS,
    MOST_CHANNELS,
    SPATIAL_PIXELS,
    TILE,
    TILE_CHOICES,
    _add_parts_kernel,
    _channel_gate_bwd_kernel,
    _gate_fwd_kernel,
    _spatial_gate_bwd_kernel,
)

from .case import StaticCase, Traffic, in_form, specialised

_PAPER = {"B": 16, "C": 256, "H": 64, "W": 64, "e": 2}
_MAPS_MOVED = {"forward": "2 * e", "backward": "3 * e"}
TRAFFIC = [Traffic(name, _PAPER, "B * C * H * W", moved, moved) for name, moved in _MAPS_MOVED.items()]

_PLANES = {"x_stride_w": 1, "gated_stride_w": 1, "grad_stride_w": 1, "x_grad_stride_w": 1}
_CHANNELS_LAST = {"x_stride_c": 1, "gated_stride_c": 1, "grad_stride_c": 1, "x_grad_stride_c": 1}


def _case(name: str, kernel, tile: tuple[int, int], constants: dict, dtype: str, choice=TILE_CHOICES[0]) -> StaticCase:
    """Specialise a kernel as its launcher does for whole maps of 64 x 64 positions and 64 channels."""
    kinds = dict.fromkeys(("x", "gated", "grad", "x_grad"), f"*{dtype}")
    kinds |= dict.fromkeys(("gate", "gate_grad", "target", "parts", "total"), "*fp32")
    tiles = {"CHANNELS": tile[0], "PIXELS": choice["tiles"] * tile[1], "FLAT": True}
    name = in_form(name, choice, TILE_CHOICES)
    return specialised(f"{name}, {dtype}", kernel, kinds, tiles | constants, unaligned=("splits",))


_ROW, _POSITIONS, _COLUMN = (1, TILE), (TILE // SPATIAL_PIXELS, SPATIAL_PIXELS), (MOST_CHANNELS, TILE // MOST_CHANNELS)
_CHANNELS = _PLANES | {"PER_CHANNEL": True}
STATIC_CASES = [
    *(_case("forward, channels", _gate_fwd_kernel, _ROW, _CHANNELS, "bf16", choice) for choice in TILE_CHOICES),
    _case("forward, positions", _gate_fwd_kernel, _ROW, _PLANES | {"PER_CHANNEL": False}, "fp32"),
    _case("forward, channels last", _gate_fwd_kernel, _COLUMN, _CHANNELS_LAST | {"PER_CHANNEL": True}, "bf16"),
    _case("backward, channels", _channel_gate_bwd_kernel, _ROW, _PLANES, "bf16"),
    _case("backward, channels", _channel_gate_bwd_kernel, _ROW, _PLANES, "fp32"),
    _case("backward, channels last", _channel_gate_bwd_kernel, _COLUMN, _CHANNELS_LAST, "bf16"),
    *(_case("backward, positions", _spatial_gate_bwd_kernel, _POSITIONS, _PLANES, "bf16", c) for c in TILE_CHOICES),
    _case("backward, positions", _spatial_gate_bwd_kernel, _POSITIONS, _PLANES, "fp32"),
    _case("backward, positions, channels last", _spatial_gate_bwd_kernel, _COLUMN, _CHANNELS_LAST, "bf16"),
    _case("parts added", _add_parts_kernel, (1, 1), {"ROWS": ADD_ROWS}, "fp32"),
]
