"""In what precision a device computes: the forward pass, and products of float32 numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
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
def tf32_allowed(allowed: bool | None) -> Iterator[None]:
    """Let float32 products on a GPU round their factors to TF32 inside the block, or not; None changes nothing."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was if allowed is None else allowed
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was


def precision_lines(device: torch.device, precision: Precision) -> list[str]:
    """Return what is to be said of a GPU's precision; of a CPU nothing, where none of it is rounded unasked."""
    if device.type != "cuda":
        return []
    why = ", as this GPU computes in it" if precision == "auto" and _computes_in_bf16(device) else ""
    tf32 = {
        "matrix products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
    }
    rounded = " and ".join(name for name, allowed in tf32.items() if allowed)
    return [
        f"forward pass in {precision_on(device, precision)}{why}; float32 numbers are rounded to TF32 in "
        f"{rounded or 'no product'}"
    ]
