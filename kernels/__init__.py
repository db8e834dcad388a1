"""The catalogue: fused operators, tensors in and tensors out.

Every operator has a twin, ``<operator>_reference``, that defines it in plain PyTorch. Importing this package loads
nothing above torch: triton and xformers are loaded by the first call that needs them.
"""

from ._library import backend
from .attention import memory_efficient_attention, memory_efficient_attention_reference
from .errors import BackendError, CheckpointError, DataError, MissingExtra, NumericError, ShapeError, TrifuseError
from .weighted_block_fusion import weighted_block_fusion, weighted_block_fusion_reference

__all__ = [
    "OPERATORS",
    "BackendError",
    "CheckpointError",
    "DataError",
    "MissingExtra",
    "NumericError",
    "ShapeError",
    "TrifuseError",
    "backend",
    "memory_efficient_attention",
    "memory_efficient_attention_reference",
    "weighted_block_fusion",
    "weighted_block_fusion_reference",
]

OPERATORS = tuple(name for name in __all__ if f"{name}_reference" in __all__)
