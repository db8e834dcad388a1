"""TAFF-UNet: myocardial scar from LGE, ECG and the AHA-17 atlas."""

from .ecg_autoencoder import EcgAutoencoder, EcgAutoencoderConfig
from .model import TaffUNet, TaffUNetConfig, taff_unet

__all__ = ["EcgAutoencoder", "EcgAutoencoderConfig", "TaffUNet", "TaffUNetConfig", "taff_unet"]
