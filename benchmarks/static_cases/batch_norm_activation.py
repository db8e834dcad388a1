"""The forward kernels of batch norm with activation, as compiled for the gate of costs, and what they move."""

from __future__ import annotations

from trifuse.kernels.gpu.batch_norm_activation import (
    CHANNELS_AT_ONCE,
    PARTS_AT_ONCE,
    _merge_batch_statistics_kernel,
    _small_maps_fwd_kernel,
)

from .case import Traffic, specialised
from .instance_norm_leaky_relu import batch_cases

MAPS = {"B": 32, "C": 64, "H": 256, "W": 256, "e": 2}
TRAFFIC = [
    Traffic("forward, training", MAPS, "B * C * H * W", "3 * e", "2 * e"),
    Traffic("forward, evaluation", MAPS, "B * C * H * W", "2 * e", "2 * e"),
]


STATIC_CASES = [
    specialised(
        "statistics merged",
        _merge_batch_statistics_kernel,
        dict.fromkeys(("part_means", "part_spreads", "means", "rstds", "running_mean", "running_var"), "*fp32")
        | {"eps": "fp32", "momentum": "fp32"},
        {"PARTS": PARTS_AT_ONCE, "CHANNELS": CHANNELS_AT_ONCE},
        ("parts", "batch", "eps", "momentum"),
    ),
    *(
        case
        for activation in ("relu", "gelu")
        for case in batch_cases("small maps", _small_maps_fwd_kernel, activation=activation, evaluation=True)
    ),
]
