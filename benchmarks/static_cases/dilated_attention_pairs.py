"""Dilated attention's kernels for pairs of pixels as they are compiled for the gate, and what its passes move."""

from __future__ import annotations

from typing import Any

import torch

from trifuse.kernels.gpu import tuning
from trifuse.kernels.gpu.dilated_attention import CHOICES, _layouts, _settings, _strides
from trifuse.kernels.gpu.dilated_attention_pairs import STEPS, constants_of, distinct

from .case import StaticCase, in_form, specialised
from .dilated_attention import TRAFFIC as TRAFFIC_OF_SINGLE_PIXELS

TRAFFIC = list(TRAFFIC_OF_SINGLE_PIXELS)  # pairs share what caches serve: no byte more or less


def _case(step: str, choice: tuning.Choice) -> StaticCase:
    """Compile a kernel as it runs on the slices of one packed projection of three heads of 24 channels."""
    q, k, v = torch.empty(2, 2, 2, 3 * 72, dtype=torch.bfloat16, device="meta").chunk(3, dim=-1)
    out = torch.empty(2, 2, 2, 72, dtype=torch.bfloat16, device="meta")
    maps = {"fwd": (q, k, v, out), "dq": (out, q, k, v, q), "dkdv": (out, q, k, v, k, v)}[step]
    settings = _settings(choice["threads"], _layouts(maps), 3, (1, 2, 3), "zero")
    each, layouts = distinct(_strides(_layouts(maps), settings["UNIT"]))
    kinds: dict[str, Any] = dict.fromkeys(("normaliser", "weighted_grad"), "*fp32")
    kinds |= {"maps": ("*bf16",) * len(maps), "strides": ((*("i32",) * 3, "constexpr"),) * len(each), "scale": "fp32"}
    constants = constants_of(step, settings, "zero") | {"LAYOUTS": layouts} | {(1, i, 3): 1 for i in range(len(each))}
    unaligned = ("strides", "height", "width", "tiles", "columns", "scale")
    name = in_form(f"{step}, bf16, head dim 24, border zero", choice, CHOICES)
    return specialised(name, STEPS[step][0], kinds, constants, unaligned, choice["threads"])


STATIC_CASES = [_case(step, choice) for choice in CHOICES for step in STEPS]
