"""The backward kernel of batch norm with activation, as compiled for the gate of costs, and what a pass moves."""

from __future__ import annotations

from trifuse.kernels.gpu.batch_norm_activation_backward import _small_maps_bwd_kernel

from .batch_norm_activation import MAPS
from .case import Traffic
from .instance_norm_leaky_relu import batch_cases

TRAFFIC = [Traffic("backward, training", MAPS, "B * C * H * W", "5 * e", "3 * e")]

STATIC_CASES = [
    *(
        case
        for activation in ("relu", "gelu")
        for case in batch_cases("small maps", _small_maps_bwd_kernel, activation=activation)
    ),
    *batch_cases("small maps in evaluation", _small_maps_bwd_kernel, evaluation=True),
]
