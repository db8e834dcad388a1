"""Dilated attention's kernels as they are compiled for the gate, and what its passes move."""

from __future__ import annotations

from typing import Any

import torch

from trifuse.kernels.gpu import tuning
from trifuse.kernels.gpu.dilated_attention import (
    CHOICES,
    _dilated_attention_dkdv_kernel,
    _dilated_attention_dq_kernel,
    _dilated_attention_fwd_kernel,
    _layouts,
    _settings,
)

from .case import StaticCase, Traffic, in_form, specialised

PAPER = {"B": 32, "H": 64, "W": 64, "C": 72, "heads": 3, "e": 2}
TRAFFIC = [
    Traffic("forward", PAPER, "B * H * W * C", "4 * e + 4 * heads / C", "4 * e"),
    Traffic("backward", PAPER, "B * H * W * C", "11 * e + 16 * heads / C", "7 * e"),
]


def _case(kernel: Any, pointers: str, d: int, border: str, choice: tuning.Choice = CHOICES[0]) -> StaticCase:
    """Compile a kernel as it runs on the slices of one packed projection of three heads; ``-`` is a missing map."""
    names = pointers.split()
    dtype = names[0].removeprefix("*")
    example = torch.empty(1, 2, 2, 3 * d, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], device="meta")
    settings = {**_settings(choice["threads"], _layouts((example,)), 3, (1, 2, 3), border), "MASK": border == "mask"}
    kinds: dict[str, Any] = dict.fromkeys(("normaliser", "weighted_grad"), "*fp32")
    kinds |= {"maps": tuple(names), "strides": ((*("i32",) * 3, "constexpr"),) * len(names), "scale": "fp32"}
    name = kernel.__name__.removeprefix("_dilated_attention_").removesuffix("_kernel")
    name = in_form(f"{name}, {dtype}, head dim {d}, border {border}", choice, CHOICES)
    constants = settings | {(1, i, 3): 1 for i in range(len(names))}
    unaligned = ("strides", "height", "width", "taps", "scale")
    return specialised(name, kernel, kinds, constants, unaligned, choice["threads"])


_MAPS = {_dilated_attention_fwd_kernel: 4, _dilated_attention_dq_kernel: 5, _dilated_attention_dkdv_kernel: 6}
STATIC_CASES = [
    *(_case(kernel, "*bf16 " * count, 24, "zero", choice) for choice in CHOICES for kernel, count in _MAPS.items()),
    _case(_dilated_attention_fwd_kernel, "*fp32 " * 4, 24, "zero"),
    _case(_dilated_attention_dq_kernel, "*fp32 " * 5, 32, "mask"),
    _case(_dilated_attention_dkdv_kernel, "*fp32 " * 6, 32, "zero"),
    _case(_dilated_attention_fwd_kernel, "*bf16 " * 4, 32, "shift"),
    _case(_dilated_attention_dkdv_kernel, "*bf16 " * 6, 32, "shift"),
]
