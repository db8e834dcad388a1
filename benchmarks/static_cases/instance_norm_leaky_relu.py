"""The forward kernels of instance norm with leaky rectifier, as compiled for the gate of costs, and what they move."""

from __future__ import annotations

from typing import Any

from trifuse.kernels.gpu.instance_norm_leaky_relu import (
    FORWARD_CHOICES,
    HELD_PER_THREAD,
    MOST_HELD,
    ROWS,
    STATISTICS_TILES,
    _held_fwd_kernel,
    _merge_statistics_kernel,
    _normalise_kernel,
    _statistics_kernel,
)
from trifuse.kernels.gpu.maps import LEAST_CHANNELS, MOST_CHANNELS, THREADS, TILE

from .case import StaticCase, Traffic, in_form, in_units, specialised

HELD = {"B": 32, "C": 128, "H": 64, "W": 64, "e": 2}
LARGE = {"B": 32, "C": 32, "H": 256, "W": 256, "e": 2}
TRAFFIC = [
    Traffic("forward, held planes", HELD, "B * C * H * W", "2 * e", "2 * e"),
    Traffic("forward, large planes", LARGE, "B * C * H * W", "3 * e", "2 * e"),
]

_MAPS = ("x", "out", "grad", "x_grad")
_OTHERS = (
    "running_mean",
    "running_var",
    "weight_grad",
    "bias_grad",
    "weight",
    "bias",
    "means",
    "rstds",
    "spreads",
    "part_means",
    "part_spreads",
    "sums",
)
_NUMBERS = ("eps", "negative_slope", "momentum")
# What the kernels of large planes are compiled for, which serve batch norms as well.
OF_INSTANCES = {"eps": None, "PER_SAMPLE": True, "ACTIVATION": "leaky_relu"}
# Tiles of held planes: of 4 x 4, 64 x 64 and 128 x 128 positions; with channels innermost, of 8 x 8 and 32 x 32.
PLANES = {"16 pixels": (64, 16), "4096 pixels": (1, 4096), "16384 pixels": (1, MOST_HELD)}
COLUMNS = {"64 pixels": (MOST_CHANNELS, 64), "1024 pixels": (LEAST_CHANNELS, MOST_HELD // LEAST_CHANNELS)}
ROW, COLUMN = (1, TILE), {"64": (MOST_CHANNELS, TILE // MOST_CHANNELS), "72": (LEAST_CHANNELS, TILE // LEAST_CHANNELS)}


def norm_case(
    name: str,
    kernel: Any,
    dtype: str,
    tile: tuple[int, int],
    *,
    channels_last: bool = False,
    constants: dict[Any, object] | None = None,
) -> StaticCase:
    """Specialise a kernel as its launcher does for flat maps of 16 bytes times some channels, with weight and bias."""
    kinds: dict[str, Any] = dict.fromkeys(_MAPS, f"*{dtype}") | dict.fromkeys(_OTHERS, "*fp32")
    kinds |= dict.fromkeys(_NUMBERS, "fp32")
    switches: dict[Any, object] = {"CHANNELS": tile[0], "PIXELS": tile[1], "FLAT": True}
    switches |= {"UNIT": 8 if channels_last else 1, **(constants or {})}
    inner = 1 if channels_last else 3
    for pointer in _MAPS:
        if f"{pointer}_strides" in kernel.arg_names:
            kinds[f"{pointer}_strides"] = tuple("constexpr" if i == inner else "i32" for i in range(4))
            switches[kernel.arg_names.index(f"{pointer}_strides"), inner] = 1
    unaligned = ("splits", "batch", *_NUMBERS, *in_units(kernel, switches))
    held = kernel.fn.__name__.startswith("_held")
    threads = max(THREADS, tile[0] * tile[1] // HELD_PER_THREAD) if held else THREADS
    return specialised(f"{name}, {dtype}", kernel, kinds, switches, unaligned, threads)


def held_cases(name: str, kernel: Any) -> list[StaticCase]:
    """Return the cases of a kernel of held planes: every size in bfloat16, the largest in float32 as well."""
    planes = [norm_case(f"{name}, {size}", kernel, "bf16", tile) for size, tile in PLANES.items()]
    largest = norm_case(f"{name}, {MOST_HELD} pixels", kernel, "fp32", PLANES[f"{MOST_HELD} pixels"])
    columns = [
        norm_case(f"{name}, {size}, channels last", kernel, "bf16", tile, channels_last=True)
        for size, tile in COLUMNS.items()
    ]
    return [*planes, largest, *columns]


def walking_cases(name: str, kernel: Any, tiles: int, constants: dict[Any, object] | None = None) -> list[StaticCase]:
    """Return the cases of a kernel that walks over large planes, so many tiles at once."""
    planes = [norm_case(name, kernel, dtype, (1, tiles * TILE), constants=constants) for dtype in ("bf16", "fp32")]
    columns = [
        norm_case(
            f"{name}, {channels} channels last",
            kernel,
            "bf16",
            (tile[0], tiles * tile[1]),
            channels_last=True,
            constants=constants,
        )
        for channels, tile in COLUMN.items()
    ]
    return [*planes, *columns]


def batch_cases(
    name: str, kernel: Any, tiles: int = 1, activation: str = "relu", *, evaluation: bool = False, **constants: Any
) -> list[StaticCase]:
    """Return the cases of a kernel of a batch norm: maps in planes, and FIAS's 72 channels innermost.

    In evaluation statistics are means and variances, to which something is added.
    """
    switches = {"PER_SAMPLE": False, "ACTIVATION": activation, **({} if evaluation else {"eps": None}), **constants}
    channels, pixels = COLUMN["72"]
    name = f"{name}, batch norm, {activation}"
    return [
        norm_case(name, kernel, "bf16", (1, tiles * TILE), constants=switches),
        norm_case(
            f"{name}, 72 channels last", kernel, "bf16", (channels, tiles * pixels),
            channels_last=True, constants=switches,
        ),
    ]  # fmt: skip


STATIC_CASES = [
    *held_cases("forward, held planes", _held_fwd_kernel),
    *walking_cases("statistics", _statistics_kernel, STATISTICS_TILES),
    specialised(
        "statistics merged",
        _merge_statistics_kernel,
        dict.fromkeys(_OTHERS, "*fp32") | {"eps": "fp32"},
        {"ROWS": ROWS},
        ("splits", "eps"),
    ),
    *(
        case
        for choice in FORWARD_CHOICES
        for case in walking_cases(
            in_form("normalisation", choice, FORWARD_CHOICES), _normalise_kernel, choice["tiles"], OF_INSTANCES
        )
    ),
    *batch_cases("statistics", _statistics_kernel, STATISTICS_TILES),
    *(
        case
        for choice in FORWARD_CHOICES
        for case in batch_cases(in_form("normalisation", choice, FORWARD_CHOICES), _normalise_kernel, choice["tiles"])
    ),
    *batch_cases("normalisation", _normalise_kernel, activation="gelu"),
    *batch_cases("normalisation in evaluation", _normalise_kernel, activation="gelu", evaluation=True),
]
