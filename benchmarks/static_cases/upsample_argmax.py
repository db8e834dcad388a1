"""The kernel of the argmax over upsampled logits as it is compiled for the gate, and what the pass moves."""

from __future__ import annotations

from trifuse.kernels.gpu import tuning
from trifuse.kernels.gpu.upsample_argmax import CHOICES, THREADS, _upsample_argmax_kernel

from .case import StaticCase, Traffic, in_form

_PAPER = {"B": 24, "K": 9, "H": 224, "W": 224, "cells": 16**2 + 32**2 + 64**2, "e": 2}
_BYTES = "1 + e * K * cells / (H * W)"
TRAFFIC = [Traffic("labels", _PAPER, "B * H * W", _BYTES, _BYTES)]


def _case(n: int, dtype: str, choice: tuning.Choice = CHOICES[0]) -> StaticCase:
    integers, floats = ("i32",) * n, ("fp32",) * n
    return StaticCase(
        name=in_form(f"labels from {n} map{'s'[: n - 1]}, {dtype}", choice, CHOICES),
        kernel=_upsample_argmax_kernel,
        signature={
            "maps": (f"*{dtype}",) * n,
            "labels": "*u8",
            **dict.fromkeys(("classes", "height", "width"), "i32"),
            **dict.fromkeys(("heights", "widths", "batch_strides", "class_strides", "row_strides"), integers),
            "column_strides": ("constexpr",) * n,
            **dict.fromkeys(("row_scales", "column_scales"), floats),
            **dict.fromkeys(("N", "COLUMNS"), "constexpr"),
        },
        constants={"N": n, "COLUMNS": choice["columns"], **{(10, i): 1 for i in range(n)}},
        aligned=("maps", "labels"),
        threads=THREADS,
    )


STATIC_CASES = [_case(1, "fp32"), *(_case(3, "bf16", choice) for choice in CHOICES)]
