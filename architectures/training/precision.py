"""In what precision a device computes: the forward pass, and products of float32 numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Tf32 = Literal["default", "on", "off"]
ROUNDED = "tf32"  # how PyTorch names products that round their factors so
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
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _rounding(tf32):
        for line in precision_lines(device, precision):
            say(line)
        yield


@contextmanager
def _rounding(tf32: Tf32) -> Iterator[None]:
    """Let products of float32 numbers round to TF32, or not; the caller's settings are afterwards what they were.

    PyTorch has an older and a newer name for them. Both are set, so that either can be read inside the block. Only the
    newer one can be read where the caller has set that; whether it follows a more general setting is found by trying.
    """
    if tf32 == "default":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    products = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [each.fp32_precision for each in products]
    _allow(matrices=tf32 == "on", others=tf32 == "on")
    for each in products:
        each.fp32_precision = ROUNDED if tf32 == "on" else "ieee"
    try:
        yield
    finally:
        _allow(matrices=before[0] == ROUNDED, others=ROUNDED in before[1:])
        for each, was in zip(products, before, strict=True):
            each.fp32_precision = "none"
            if each.fp32_precision != was:
                each.fp32_precision = was


def _allow(*, matrices: bool, others: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matrices
    torch.backends.cudnn.allow_tf32 = others


def precision_lines(device: torch.device, precision: Precision) -> list[str]:
    """Return what is to be said of a GPU's precision; of a CPU nothing, where none of it is rounded unasked."""
    if device.type != "cuda":
        return []
    why = ", as this GPU computes in it" if precision == "auto" and _computes_in_bf16(device) else ""
    cudnn: Any = torch.backends.cudnn
    products = {"matrix products": torch.backends.cuda.matmul, "convolutions": cudnn.conv}
    rounded = " and ".join(name for name, each in products.items() if each.fp32_precision == ROUNDED)
    return [
        f"forward pass in {precision_on(device, precision)}{why}; float32 numbers are rounded to TF32 in "
        f"{rounded or 'no product'}"
    ]
