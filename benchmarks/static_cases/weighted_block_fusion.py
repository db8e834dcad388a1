"""Weighted block fusion's kernels as they are compiled for the gate, and what its passes move."""

from __future__ import annotations

from trifuse.kernels.gpu import launching, tuning
from trifuse.kernels.gpu.weighted_block_fusion import (
    BACKWARD_CHOICES,
    FORWARD_CHOICES,
    MAPS_IN_FLIGHT,
    MAPS_PER_GROUP,
    REDUCE_ELEMENTS,
    REDUCE_THREADS,
    _weighted_block_fusion_bwd_kernel,
    _weighted_block_fusion_fwd_kernel,
    _weighted_block_fusion_logits_kernel,
)

from .case import StaticCase, Traffic, in_form

_PAPER = {"B": 32, "M": 1025, "D": 768, "N": 12, "launches": 1, "e": 2}
_DEEP = {**_PAPER, "D": 1536, "N": 40, "launches": 2}
TRAFFIC = [
    Traffic("forward", _PAPER, "B * M * D", "(N + 1) * e", "(N + 1) * e"),
    Traffic("forward", _DEEP, "B * M * D", "(N + 1) * e", "(N + 1) * e"),
    Traffic("forward, selecting", _PAPER | {"K": 4}, "B * M * D", "(N + 1 + K) * e", "(N + 1 + K) * e"),
    Traffic("forward, selecting", _DEEP | {"K": 4}, "B * M * D", "(N + 1 + K) * e", "(N + 1 + K) * e"),
    Traffic("backward, frozen maps", _PAPER, "B * M * D", "(N + launches) * e", "(N + 1) * e"),
    Traffic("backward, frozen maps", _DEEP, "B * M * D", "(N + launches) * e", "(N + 1) * e"),
    Traffic("backward, trained maps", _PAPER, "B * M * D", "(2 * N + launches) * e", "(2 * N + 1) * e"),
]

_VECTORS = {"bf16": 8, "fp32": 4}
_ALIGNED_SIZES = ("row_elements", "map_stride")


def _forward_case(n: int, dtype: str, choice: tuning.Choice = FORWARD_CHOICES[0], selected: int = 0) -> StaticCase:
    name = f"forward, {n} maps, {f'{selected} selected, ' * (selected > 0)}{dtype}"
    return StaticCase(
        name=in_form(name, choice, FORWARD_CHOICES),
        kernel=_weighted_block_fusion_fwd_kernel,
        signature={
            "maps": (f"*{dtype}",) * n,
            "logits": "*fp32",
            "fused": f"*{dtype}",
            "selection": "*i64" if selected else "constexpr",
            "selected": (f"*{dtype}",) * selected if selected else "constexpr",
            "row_elements": "i32",
            "map_stride": "i32",
            "N": "constexpr",
            "K": "constexpr",
            "TILE": "constexpr",
            "GROUP": "constexpr",
            "IN_FLIGHT": "constexpr",
        },
        constants={
            "N": n,
            "K": selected,
            "TILE": choice["threads"] * _VECTORS[dtype],
            "GROUP": MAPS_PER_GROUP if selected else 1,
            "IN_FLIGHT": MAPS_IN_FLIGHT,
            **({} if selected else {"selection": None, "selected": None}),
        },
        aligned=("maps", "logits", "fused", *(("selection", "selected") if selected else ()), *_ALIGNED_SIZES),
        threads=choice["threads"],
    )


def _backward_case(
    n: int, count: int, trained: bool, dtype: str, choice: tuning.Choice = BACKWARD_CHOICES[0]
) -> StaticCase:
    name = f"backward, {count} of {n} {'trained' if trained else 'frozen'} maps, {dtype}"
    return StaticCase(
        name=in_form(name, choice, BACKWARD_CHOICES),
        kernel=_weighted_block_fusion_bwd_kernel,
        signature={
            "grad": f"*{dtype}",
            "maps": (f"*{dtype}",) * count,
            "map_grads": (f"*{dtype}" if trained else "constexpr",) * count,
            "logits": "*fp32",
            "partial_sums": "*fp32",
            "row_elements": "i32",
            "map_stride": "i32",
            "tiles": "i32",
            "first": "i32",
            "N": "constexpr",
            "COUNT": "constexpr",
            "TILE": "constexpr",
            "VECTOR": "constexpr",
        },
        constants={
            "N": n,
            "COUNT": count,
            "TILE": choice["threads"] * _VECTORS[dtype],
            "VECTOR": _VECTORS[dtype],
            **({} if trained else {(2, i): None for i in range(count)}),
        },
        aligned=("grad", "maps", "map_grads", "logits", "partial_sums", "row_elements", "map_stride"),
        threads=choice["threads"],
    )


def _logits_case(n: int) -> StaticCase:
    padded = launching.next_power_of_2(n)
    return StaticCase(
        name=f"gradient of {n} logits",
        kernel=_weighted_block_fusion_logits_kernel,
        signature={
            "partial_sums": "*fp32",
            "logits": "*fp32",
            "logits_grad": "*fp32",
            "programs": "i32",
            "N": "constexpr",
            "N_PADDED": "constexpr",
            "ROWS": "constexpr",
        },
        constants={"N": n, "N_PADDED": padded, "ROWS": REDUCE_ELEMENTS // padded},
        aligned=("partial_sums", "logits", "logits_grad"),
        threads=REDUCE_THREADS,
    )


STATIC_CASES = [
    _forward_case(12, "bf16"),
    _forward_case(12, "fp32"),
    _forward_case(24, "bf16"),
    _forward_case(40, "bf16"),
    _forward_case(64, "fp32"),
    _forward_case(12, "bf16", selected=4),
    _forward_case(12, "fp32", selected=4),
    _forward_case(24, "bf16", selected=4),
    _forward_case(40, "bf16", selected=4),
    _backward_case(12, 12, False, "bf16"),
    _backward_case(24, 24, False, "bf16"),
    _backward_case(40, 20, False, "bf16"),
    _backward_case(24, 24, False, "fp32"),
    _backward_case(24, 24, True, "bf16"),
    _backward_case(24, 24, True, "fp32"),
    *(_forward_case(12, "bf16", choice, selected) for selected in (0, 4) for choice in FORWARD_CHOICES[1:]),
    *(_backward_case(12, 12, trained, "bf16", choice) for trained in (False, True) for choice in BACKWARD_CHOICES[1:]),
    _logits_case(12),
    _logits_case(64),
]
