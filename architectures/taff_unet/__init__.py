"""TAFF-UNet: myocardial scar from LGE, ECG and the AHA-17 atlas."""

from .aha17 import aha17_map
from .ecg_autoencoder import EcgAutoencoder, EcgAutoencoderConfig
from .model import TaffUNet, TaffUNetConfig, taff_unet

__all__ = ["EcgAutoencoder", "EcgAutoencoderConfig", "TaffUNet", "TaffUNetConfig", "aha17_map", "taff_unet"]
