"""FIAS: multi-organ and cardiac segmentation with DilateFormer, multi-kernel convolutions and mixing attention."""

from .dilateformer import DilateFormer, dilateformer_base, dilateformer_small, dilateformer_tiny
from .model import Fias, FiasConfig, fias

__all__ = [
    "DilateFormer",
    "Fias",
    "FiasConfig",
    "dilateformer_base",
    "dilateformer_small",
    "dilateformer_tiny",
    "fias",
]
