"""In what precision a device computes: the forward pass, and products of float32 numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Tf32 = Literal["default", "on", "off"]
FIRST_WITH_BF16 = (8, 0)  # compute capability: older GPUs have no units for it, and PyTorch only emulates it there


def precision_on(device: torch.device, precision: Precision) -> Precision:
    """Return what a precision means on a device: "auto" is "bf16" on a GPU that computes in it, "fp32" elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if _computes_in_bf16(device) else "fp32"


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16


@contextmanager
def computing(device: torch.device, precision: Precision, tf32: Tf32, say: Callable[[str], None]) -> Iterator[None]:
    """Compute on a device inside the block; the caller's random state and TF32 settings are afterwards what they were.

    Args:
        device: whose random state is kept beside that of the CPU.
        precision: of the forward pass, to be said.
        tf32: whether float32 products on a GPU round their factors to TF32; "default" changes nothing.
        say: takes a line on what the device computes in.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for backend, was in zip(backends, before, strict=True):
                backend.allow_tf32 = was if tf32 == "default" else tf32 == "on"
            for line in precision_lines(device, precision):
                say(line)
            yield
        finally:
            for backend, was in zip(backends, before, strict=True):
                backend.allow_tf32 = was


def precision_lines(device: torch.device, precision: Precision) -> list[str]:
    """Return what is to be said of a GPU's precision; of a CPU nothing, where none of it is rounded unasked."""
    if device.type != "cuda":
        return []
    why = ", as this GPU computes in it" if precision == "auto" and _computes_in_bf16(device) else ""
    allowed = {
        "matrix products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
    }
    rounded = " and ".join(name for name, is_allowed in allowed.items() if is_allowed)
    return [
        f"forward pass in {precision_on(device, precision)}{why}; float32 numbers are rounded to TF32 in "
        f"{rounded or 'no product'}"
    ]
