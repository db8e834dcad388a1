"""The kernels of the deeply supervised loss as they are compiled for the gate, and what the passes move."""

from __future__ import annotations

from trifuse.kernels.gpu import tuning
from trifuse.kernels.gpu.deep_supervision_loss import (
    _add_levels_kernel,
    _level_gradients_kernel,
    _level_sums_kernel,
)
from trifuse.kernels.gpu.logit_rows import TILE, WARPS
from trifuse.kernels.gpu.segmentation_sums import ADDED_COLUMNS, ADDED_ROWS, FORWARD_CHOICES

from .case import StaticCase, Traffic, in_form

LEVELS = 5  # of the U-Nets
_FIVE_LEVELS = {"B": 32, "K": 4, "H": 256, "W": 256, "e": 2}  # each of half the sides of the one before
_LABELS = "8 / K * 256 / 341"  # of the full target, whose views the others are
_ELEMENTS, _WORK = "B * K * H * W * 341 / 256", {"exponentials": "1"}
TRAFFIC = [
    Traffic("forward", _FIVE_LEVELS, _ELEMENTS, f"e + {_LABELS}", f"e + {_LABELS}", _WORK),
    Traffic("backward", _FIVE_LEVELS, _ELEMENTS, f"2 * e + {_LABELS}", f"2 * e + {_LABELS}", _WORK),
]


def _walk_case(kernel: object, levels: int, dtype: str, choice: tuning.Choice = FORWARD_CHOICES[0]) -> StaticCase:
    """Return a case of a kernel that walks over maps (B, 4, h, w), and over targets of which one is contiguous."""
    backward = kernel is _level_gradients_kernel
    reads: dict[str, str | tuple[str, ...]] = {
        "maps": (f"*{dtype}",) * levels,
        "strides": ("i32", "i32", "i32", "constexpr") * levels,
        "targets": ("*i64",) * levels,
        "target_strides": ("i32", "i32", "constexpr", *("i32",) * (3 * (levels - 1))),
    }
    shared = {"geometry": ("i32",) * (5 * levels), "ends": ("i32",) * levels}
    if backward:
        signature = {"slopes": "*fp32", **reads, "grads": (f"*{dtype}",) * levels, **shared}
    else:
        signature = {**reads, **dict.fromkeys(("partial", "partial_true"), "*fp32"), **shared}
    switches: dict[str | tuple[int, ...], object] = {
        "L": levels,
        "K": 4,
        "STEPS": choice["steps"],
        "TILE": TILE,
        **({} if backward else {"WARPS": WARPS}),
    }
    place = {name: position for position, name in enumerate(signature)}
    contiguous = [(place["strides"], 4 * level + 3) for level in range(levels)] + [(place["target_strides"], 2)]
    return StaticCase(
        name=in_form(f"{'gradients' if backward else 'sums'} of {levels} levels, {dtype}", choice, FORWARD_CHOICES),
        kernel=kernel,
        signature={**signature, "IGNORED": "constexpr", **dict.fromkeys(map(str, switches), "constexpr")},
        constants={"IGNORED": None, **switches, **dict.fromkeys(contiguous, 1)},
        aligned=("maps", "partial", "partial_true", "slopes", "grads"),
        threads=TILE,
    )


def _added_case(levels: int) -> StaticCase:
    signature: dict[str, str | tuple[str, ...]] = {
        **dict.fromkeys(("partial", "partial_true", "sums", "true"), "*fp32"),
        **dict.fromkeys(("starts", "counts"), ("i32",) * levels),
        **dict.fromkeys(("columns", "classes"), "i32"),
        **dict.fromkeys(("L", "ROWS", "COLUMNS"), "constexpr"),
    }
    return StaticCase(
        name=f"sums of programs of {levels} levels added up",
        kernel=_add_levels_kernel,
        signature=signature,
        constants={"L": levels, "ROWS": ADDED_ROWS, "COLUMNS": ADDED_COLUMNS},
        aligned=("partial", "partial_true", "sums", "true"),
        threads=TILE,
    )


STATIC_CASES = [
    *(_walk_case(_level_sums_kernel, LEVELS, "bf16", choice) for choice in FORWARD_CHOICES),
    _walk_case(_level_sums_kernel, LEVELS, "fp32"),
    _added_case(LEVELS),
    *(_walk_case(_level_gradients_kernel, LEVELS, "bf16", choice) for choice in FORWARD_CHOICES),
    _walk_case(_level_gradients_kernel, LEVELS, "fp32"),
]
