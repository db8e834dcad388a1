"""TAFF-UNet: myocardial scar from LGE, ECG and the AHA-17 atlas."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .experiment import EXPERIMENT

_FILES = {  # the public names, each resolved when it is first used: importing this package loads no torch
    "aha17_map": "aha17",
    "EcgAutoencoder": "ecg_autoencoder",
    "EcgAutoencoderConfig": "ecg_autoencoder",
    "taff_unet": "model",
    "TaffUNet": "model",
    "TaffUNetConfig": "config",
}
__all__ = [
    "EXPERIMENT",
    "EcgAutoencoder",
    "EcgAutoencoderConfig",
    "TaffUNet",
    "TaffUNetConfig",
    "aha17_map",
    "taff_unet",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_FILES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
