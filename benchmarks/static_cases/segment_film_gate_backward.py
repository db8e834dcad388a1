"""The segment FiLM gate's backward kernels as they are compiled for the gate of costs, and what the pass moves."""

from __future__ import annotations

from trifuse.kernels.gpu.segment_film_gate_backward import (
    BACKWARD_CHOICES,
    CHANNELS_AT_ONCE,
    PARTS_AT_ONCE,
    SEGMENTS_AT_ONCE,
    _segment_film_columns_bwd_kernel,
    _segment_film_planes_bwd_kernel,
    _segment_film_small_bwd_kernel,
)

from .case import StaticCase, Traffic, in_form
from .segment_film_gate import COLUMNS, PAPER, film_case

TRAFFIC = [Traffic("backward", PAPER, "B * C * H * W", "3 * e + 1 / C", "3 * e + 1 / C")]

_ONLY_THE_REST: dict[str, object] = {"features_grad": None}


def _planes(
    name: str, dtype: str, pixels: int = BACKWARD_CHOICES[0]["pixels"], constants: dict[str, object] | None = None
) -> StaticCase:
    return film_case(
        in_form(name, {"pixels": pixels}, BACKWARD_CHOICES),
        _segment_film_planes_bwd_kernel,
        dtype,
        tile=(1024 // pixels, pixels),
        constants={"SEGMENTS": SEGMENTS_AT_ONCE, **(constants or {})},
    )


STATIC_CASES = [
    _planes("backward", "bf16"),
    _planes("backward", "fp32"),
    _planes("backward of the rest", "bf16", constants=_ONLY_THE_REST),
    *(_planes("backward", "bf16", choice["pixels"]) for choice in BACKWARD_CHOICES[1:]),
    *(
        film_case(
            f"backward, {name}",
            _segment_film_columns_bwd_kernel,
            "bf16",
            tile=tile,
            channels_last=True,
            constants={"SEGMENTS": 32},
        )
        for name, tile in COLUMNS.items()
    ),
    film_case(
        "gradients from the sums",
        _segment_film_small_bwd_kernel,
        "fp32",
        tile=(CHANNELS_AT_ONCE, 0),
        constants={"PARTS": PARTS_AT_ONCE},
    ),
]
