"""Dilated attention's kernel for pairs of pixels as it is compiled for the gate, and what it moves."""

from __future__ import annotations

from typing import Any

import torch

from trifuse.kernels.gpu import tuning
from trifuse.kernels.gpu.dilated_attention import CHOICES, _layouts, _settings, _strides
from trifuse.kernels.gpu.dilated_attention_pairs import CONSTANTS, _dilated_attention_fwd_pairs_kernel, distinct

from .case import StaticCase, in_form, specialised
from .dilated_attention import TRAFFIC as TRAFFIC_OF_SINGLE_PIXELS

TRAFFIC = [each for each in TRAFFIC_OF_SINGLE_PIXELS if each.name == "forward"]  # pairs share what caches serve


def pairs_case(step: str, kernel: Any, maps: str, choice: tuning.Choice) -> StaticCase:
    """Compile a kernel as it runs on the slices of one packed projection of three heads of 24 channels."""
    q, k, v = torch.empty(2, 2, 2, 3 * 72, dtype=torch.bfloat16, device="meta").chunk(3, dim=-1)
    named = {"q": q, "k": k, "v": v, "out": torch.empty(2, 2, 2, 72, dtype=torch.bfloat16, device="meta")}
    layouts = _layouts([named[name] for name in maps.split()])
    settings = _settings(choice["threads"], layouts, 3, (1, 2, 3), "zero")
    each, kinds_of_layout = distinct(_strides(layouts, settings["UNIT"]))
    kinds: dict[str, Any] = {"normaliser": "*fp32", "factors": "*fp16", "units": "*fp32", "scale": "fp32"}
    kinds |= {"maps": ("*bf16",) * len(layouts), "strides": ((*("i32",) * 3, "constexpr"),) * len(each)}
    constants = {name: settings[name] for name in CONSTANTS} | {"LAYOUTS": kinds_of_layout, "MASK": False}
    constants |= {(1, i, 3): 1 for i in range(len(each))}
    name = in_form(f"{step}, bf16, head dim 24, border zero", choice, CHOICES)
    return specialised(
        name, kernel, kinds, constants, ("strides", "height", "width", "tiles", "scale"), choice["threads"]
    )


STATIC_CASES = [pairs_case("fwd", _dilated_attention_fwd_pairs_kernel, "q k v out", choice) for choice in CHOICES]
