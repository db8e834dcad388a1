"""The backward kernels of instance norm with leaky rectifier, as compiled for the gate of costs, and what they move."""

from __future__ import annotations

from trifuse.kernels.gpu.instance_norm_leaky_relu_backward import (
    CHANNELS_AT_ONCE,
    SAMPLES_AT_ONCE,
    _affine_gradients_kernel,
    _gradient_kernel,
    _held_bwd_kernel,
)
from trifuse.kernels.gpu.maps import TILE_CHOICES

from .case import Traffic, in_form, specialised
from .instance_norm_leaky_relu import HELD, LARGE, OF_INSTANCES, batch_cases, held_cases, walking_cases

TRAFFIC = [
    Traffic("backward, held planes", HELD, "B * C * H * W", "3 * e", "3 * e"),
    Traffic("backward, large planes", LARGE, "B * C * H * W", "5 * e", "3 * e"),
]

STATIC_CASES = [
    *held_cases("backward, held planes", _held_bwd_kernel),
    *walking_cases("sums", _gradient_kernel, 1, {"x_grad": None, **OF_INSTANCES}),
    *(
        case
        for choice in TILE_CHOICES
        for case in walking_cases(
            in_form("gradient of the map", choice, TILE_CHOICES), _gradient_kernel, choice["tiles"], OF_INSTANCES
        )
    ),
    *(
        case
        for activation in ("relu", "gelu")
        for case in (
            *batch_cases("sums", _gradient_kernel, activation=activation, x_grad=None),
            *(
                case
                for choice in TILE_CHOICES
                for case in batch_cases(
                    in_form("gradient of the map", choice, TILE_CHOICES), _gradient_kernel, choice["tiles"], activation
                )
            ),
        )
    ),
    *batch_cases("gradient of the map in evaluation", _gradient_kernel, sums=None, evaluation=True),
    specialised(
        "gradients of weight and bias, batch norm",
        _affine_gradients_kernel,
        dict.fromkeys(("sums", "weight_grad", "bias_grad", "totals"), "*fp32"),
        {"SAMPLES": SAMPLES_AT_ONCE, "CHANNELS": CHANNELS_AT_ONCE},
        ("batch",),
    ),
    specialised(
        "gradients of weight and bias",
        _affine_gradients_kernel,
        dict.fromkeys(("sums", "weight_grad", "bias_grad"), "*fp32"),
        {"totals": None, "SAMPLES": SAMPLES_AT_ONCE, "CHANNELS": CHANNELS_AT_ONCE},
        ("batch",),
    ),
]
