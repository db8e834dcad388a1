"""FIAS: multi-organ and cardiac segmentation with DilateFormer, multi-kernel convolutions and mixing attention."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .experiment import EXPERIMENT

_FILES = {  # the public names, each resolved when it is first used: importing this package loads no torch
    "DilateFormer": "dilateformer",
    "dilateformer_base": "dilateformer",
    "dilateformer_small": "dilateformer",
    "dilateformer_tiny": "dilateformer",
    "Fias": "model",
    "fias": "model",
    "FiasConfig": "model",
}
__all__ = [
    "EXPERIMENT",
    "DilateFormer",
    "Fias",
    "FiasConfig",
    "dilateformer_base",
    "dilateformer_small",
    "dilateformer_tiny",
    "fias",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_FILES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
