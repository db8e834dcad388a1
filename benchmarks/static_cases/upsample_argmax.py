"""The kernel of the argmax over upsampled logits as it is compiled for the gate, and what the pass moves."""

from __future__ import annotations

from trifuse.kernels.gpu import tuning
from trifuse.kernels.gpu.upsample_argmax import CHOICES, COLUMNS, _upsample_argmax_kernel, walks_of

from .case import StaticCase, Traffic, in_form

_PAPER = {"B": 24, "K": 9, "H": 224, "W": 224, "cells": 16**2 + 32**2 + 64**2, "e": 2}
_BYTES = "1 + e * K * cells / (H * W)"
TRAFFIC = [Traffic("labels", _PAPER, "B * H * W", _BYTES, _BYTES)]


def _case(
    n: int, classes: int, dtype: str, choice: tuning.Choice = CHOICES[0], columns: int = COLUMNS[0]
) -> StaticCase:
    integers, floats = ("i32",) * n, ("fp32",) * n
    together, walks = walks_of(n, classes)
    signature = {
        "maps": (f"*{dtype}",) * n,
        "labels": "*u8",
        "sums": "*fp32" if walks > 1 else "constexpr",
        "classes": "i32",
        "walks": "i32" if walks > 1 else "constexpr",
        **dict.fromkeys(("height", "width"), "i32"),
        **dict.fromkeys(("heights", "widths", "batch_strides", "class_strides", "row_strides"), integers),
        "column_strides": ("constexpr",) * n,
        **dict.fromkeys(("row_scales", "column_scales"), floats),
        **dict.fromkeys(("N", "K", "ROWS", "COLUMNS"), "constexpr"),
    }
    constants: dict[str | tuple[int, ...], object] = {"sums": None, "walks": 1} if walks == 1 else {}
    constants |= {"N": n, "K": together, "ROWS": choice["rows"], "COLUMNS": columns}
    place = list(signature).index("column_strides")
    name = f"labels of {classes} classes from {n} map{'s'[: n - 1]}, {dtype}"
    return StaticCase(
        name=in_form(name, choice, CHOICES),
        kernel=_upsample_argmax_kernel,
        signature=signature,
        constants=constants | {(place, i): 1 for i in range(n)},
        aligned=("maps", "labels", "sums"),
        threads=columns,
    )


STATIC_CASES = [
    _case(1, 4, "fp32"),
    _case(1, 104, "fp32"),
    _case(3, 9, "bf16"),
    *(_case(3, 9, "bf16", choice, COLUMNS[1]) for choice in CHOICES[1:]),
]
