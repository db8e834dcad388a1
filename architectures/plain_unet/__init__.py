"""The plain U-Net of nnU-Net in two dimensions: the baseline that the other networks are compared with."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .experiment import EXPERIMENT

_FILES = {  # the public names, each resolved when it is first used: importing this package loads no torch
    "plain_unet": "model",
    "PlainUNet": "model",
    "PlainUNetConfig": "model",
}
__all__ = ["EXPERIMENT", "PlainUNet", "PlainUNetConfig", "plain_unet"]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_FILES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
