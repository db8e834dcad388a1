"""TAFF-UNet: myocardial scar from LGE, ECG and the AHA-17 atlas."""

from .ecg_autoencoder import EcgAutoencoder, EcgAutoencoderConfig

__all__ = ["EcgAutoencoder", "EcgAutoencoderConfig"]
