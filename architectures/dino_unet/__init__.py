"""DINO-UNet: left-atrium segmentation with a frozen DINOv2, weighted block fusion and a U-Net decoder."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .experiment import EXPERIMENT

_FILES = {  # the public names, each resolved when it is first used: importing this package loads no torch
    "dino_unet_base": "model",
    "dino_unet_giant": "model",
    "dino_unet_large": "model",
    "dino_unet_on": "model",
    "dino_unet_small": "model",
    "dino_unet_tiny": "model",
    "DinoUNet": "model",
    "DinoUNetConfig": "model",
    "DinoV2Encoder": "encoder",
    "DinoV3Encoder": "dinov3_encoder",
}
__all__ = [
    "EXPERIMENT",
    "DinoUNet",
    "DinoUNetConfig",
    "DinoV2Encoder",
    "DinoV3Encoder",
    "dino_unet_base",
    "dino_unet_giant",
    "dino_unet_large",
    "dino_unet_on",
    "dino_unet_small",
    "dino_unet_tiny",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_FILES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
