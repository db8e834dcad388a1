"""The catalogue: fused operators, tensors in and tensors out.

Every operator has a twin, ``<operator>_reference``, that defines it in plain PyTorch. Names are resolved when they are
first used: importing this package loads not even torch; triton and xformers come with the first call that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "trifuse.kernels":
    raise ImportError(
        f"this folder is the package 'trifuse.kernels', but it was imported as {__name__!r}; "
        "install trifuse (pip install -e .) and use: import trifuse.kernels"
    )

from .errors import (
    BackendError,
    CheckpointError,
    DataError,
    MissingExtra,
    NamespaceTaken,
    NumericError,
    ShapeError,
    TrifuseError,
)

if TYPE_CHECKING:
    from .gpu.tuning import warm_up
    from .library import backend
    from .ops.batch_norm_activation import batch_norm_activation, batch_norm_activation_reference
    from .ops.depthwise_multi_kernel import depthwise_multi_kernel, depthwise_multi_kernel_reference
    from .ops.dice_ce_loss import dice_ce_loss, dice_ce_loss_reference
    from .ops.dilated_attention import (
        dilated_attention,
        dilated_attention_reference,
        dilated_attention_weights,
        dilated_attention_weights_reference,
    )
    from .ops.gates import channel_gate, channel_gate_reference, spatial_gate, spatial_gate_reference
    from .ops.instance_norm_leaky_relu import instance_norm_leaky_relu, instance_norm_leaky_relu_reference
    from .ops.memory_efficient_attention import memory_efficient_attention, memory_efficient_attention_reference
    from .ops.monte_carlo_pool import monte_carlo_pool, monte_carlo_pool_reference
    from .ops.mutation_loss import mutation_loss, mutation_loss_reference
    from .ops.residual_layer_norm import residual_layer_norm, residual_layer_norm_reference
    from .ops.segment_film_gate import segment_film_gate, segment_film_gate_reference
    from .ops.temporal_film_gate import temporal_film_gate, temporal_film_gate_reference
    from .ops.upsample_argmax import upsample_argmax, upsample_argmax_reference
    from .ops.weighted_block_fusion import weighted_block_fusion, weighted_block_fusion_reference

__all__ = [
    "OPERATORS",
    "BackendError",
    "CheckpointError",
    "DataError",
    "MissingExtra",
    "NamespaceTaken",
    "NumericError",
    "ShapeError",
    "TrifuseError",
    "backend",
    "batch_norm_activation",
    "batch_norm_activation_reference",
    "channel_gate",
    "channel_gate_reference",
    "depthwise_multi_kernel",
    "depthwise_multi_kernel_reference",
    "dice_ce_loss",
    "dice_ce_loss_reference",
    "dilated_attention",
    "dilated_attention_reference",
    "dilated_attention_weights",
    "dilated_attention_weights_reference",
    "instance_norm_leaky_relu",
    "instance_norm_leaky_relu_reference",
    "memory_efficient_attention",
    "memory_efficient_attention_reference",
    "monte_carlo_pool",
    "monte_carlo_pool_reference",
    "mutation_loss",
    "mutation_loss_reference",
    "residual_layer_norm",
    "residual_layer_norm_reference",
    "segment_film_gate",
    "segment_film_gate_reference",
    "spatial_gate",
    "spatial_gate_reference",
    "temporal_film_gate",
    "temporal_film_gate_reference",
    "upsample_argmax",
    "upsample_argmax_reference",
    "warm_up",
    "weighted_block_fusion",
    "weighted_block_fusion_reference",
]

OPERATORS = {
    "batch_norm_activation": "batch_norm_activation",
    "channel_gate": "gates",
    "depthwise_multi_kernel": "depthwise_multi_kernel",
    "dice_ce_loss": "dice_ce_loss",
    "dilated_attention": "dilated_attention",
    "dilated_attention_weights": "dilated_attention",
    "instance_norm_leaky_relu": "instance_norm_leaky_relu",
    "memory_efficient_attention": "memory_efficient_attention",
    "monte_carlo_pool": "monte_carlo_pool",
    "mutation_loss": "mutation_loss",
    "residual_layer_norm": "residual_layer_norm",
    "segment_film_gate": "segment_film_gate",
    "spatial_gate": "gates",
    "temporal_film_gate": "temporal_film_gate",
    "upsample_argmax": "upsample_argmax",
    "weighted_block_fusion": "weighted_block_fusion",
}
"""The file of each operator, in ``ops``."""

_OTHERS = {"backend": "library", "warm_up": "gpu.tuning"}


if not TYPE_CHECKING:  # to a type checker, a module with this function has every name

    def __getattr__(name: str) -> Any:
        op = name.removesuffix("_reference")
        file = f"ops.{OPERATORS[op]}" if op in OPERATORS else _OTHERS.get(name)
        if file is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{file}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
