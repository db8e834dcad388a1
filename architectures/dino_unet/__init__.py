"""DINO-UNet: left-atrium segmentation with a frozen DINOv2, weighted block fusion and a U-Net decoder."""

from .encoder import DinoV2Encoder
from .model import (
    DinoUNet,
    DinoUNetConfig,
    dino_unet_base,
    dino_unet_giant,
    dino_unet_large,
    dino_unet_small,
    dino_unet_tiny,
)

__all__ = [
    "DinoUNet",
    "DinoUNetConfig",
    "DinoV2Encoder",
    "dino_unet_base",
    "dino_unet_giant",
    "dino_unet_large",
    "dino_unet_small",
    "dino_unet_tiny",
]
