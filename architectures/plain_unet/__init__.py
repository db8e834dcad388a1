"""The plain U-Net of nnU-Net in two dimensions: the baseline that the other networks are compared with."""

from .model import PlainUNet, PlainUNetConfig, plain_unet

__all__ = ["PlainUNet", "PlainUNetConfig", "plain_unet"]
