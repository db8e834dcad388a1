"""The segmentation sums' forward kernel as it is compiled for the gate, and what the pass moves."""

from __future__ import annotations

from trifuse.kernels.gpu import tuning
from trifuse.kernels.gpu.logit_rows import TILE, WARPS
from trifuse.kernels.gpu.segmentation_sums import (
    ADDED_COLUMNS,
    ADDED_ROWS,
    FORWARD_CHOICES,
    _add_programs_kernel,
    _segmentation_sums_fwd_kernel,
    shares,
)
from trifuse.kernels.gpu.segmentation_sums_backward import UNROLLED

from .case import StaticCase, Traffic, in_form

_PAPER = {"B": 24, "K": 9, "H": 224, "W": 224, "N": 3, "e": 2}
_READ, _WORK = "e + 8 / (N * K)", {"exponentials": "(2**N - 1) / N"}
TRAFFIC = [
    Traffic("forward", {**_PAPER, "N": 1}, "B * K * H * W * N", _READ, _READ, _WORK),
    Traffic("forward", _PAPER, "B * K * H * W * N", _READ, _READ, _WORK),
]


def sums_case(
    kernel: object,
    maps: int,
    classes: int,
    dtype: str,
    *,
    coarse: bool,
    launch: int = 0,
    choice: tuning.Choice = FORWARD_CHOICES[0],
) -> StaticCase:
    """Return a case of a launch of the forward kernel, or of the backward kernel of `mutation_loss`, which reads alike.

    A launch of the forward kernel need not read all maps.
    """
    name = f"{maps} {'coarse' if coarse else 'full'} map{'s'[: maps - 1]}, {dtype}{', second launch' * launch}"
    backward = kernel is not _segmentation_sums_fwd_kernel
    subsets: dict[str | tuple[int, ...], object] = {"UNROLLED": min(maps, UNROLLED)}
    if not backward:
        share = shares(maps, classes, coarse)[launch]
        subsets = {"UNROLLED": share.unrolled, "FIRST": share.first, "END": share.end, "SUBSETS": 2**maps - 1}
        maps = share.maps
    reads: dict[str, str | tuple[str, ...]] = {
        "maps": (f"*{dtype}",) * maps,
        "strides": ("i32", "i32", "i32", "constexpr") * maps,
        "sizes": ("i32" if coarse else "constexpr",) * (2 * maps),
        "target": "*i64",
        "target_strides": ("i32", "i32", "constexpr"),
    }
    geometry = dict.fromkeys(("rows", "width", "pixels", "tiles_across", "strips"), "i32") | {"IGNORED": "constexpr"}
    if backward:
        grads = {"grads": ("*fp32" if coarse else f"*{dtype}",) * maps, "folded": ("i32",) * maps}
        signature = {"sum_grads": "*fp32", **reads, **grads, **geometry}
    else:
        signature = {**reads, **dict.fromkeys(("partial", "partial_true"), "*fp32"), **geometry}
    switches: dict[str | tuple[int, ...], object] = {
        "N": maps,
        "K": classes,
        **subsets,
        "SQUARED": True,
        "STEPS": choice["steps"],
        "TILE": TILE,
        **({} if backward else {"WARPS": WARPS}),
    }
    place = {name: position for position, name in enumerate(signature)}
    constants: dict[str | tuple[int, ...], object] = {"IGNORED": None, **switches}
    contiguous = [(place["strides"], 4 * i + 3) for i in range(maps)] + [(place["target_strides"], 2)]
    constants |= dict.fromkeys(contiguous, 1)
    if not coarse:
        constants |= dict.fromkeys([(place["sizes"], i) for i in range(2 * maps)])
    return StaticCase(
        name=in_form(name, choice, FORWARD_CHOICES),
        kernel=kernel,
        signature={**signature, **dict.fromkeys(map(str, switches), "constexpr")},
        constants=constants,
        aligned=("maps", "target", "partial", "partial_true", "sum_grads", "grads"),
        threads=TILE,
    )


def _added_case() -> StaticCase:
    signature = {
        **dict.fromkeys(("partial", "partial_true", "sums", "true"), "*fp32"),
        **dict.fromkeys(("programs", "columns", "classes"), "i32"),
        **dict.fromkeys(("ROWS", "COLUMNS"), "constexpr"),
    }
    return StaticCase(
        name="sums of programs added up",
        kernel=_add_programs_kernel,
        signature=signature,
        constants={"ROWS": ADDED_ROWS, "COLUMNS": ADDED_COLUMNS},
        aligned=("partial", "partial_true", "sums", "true"),
        threads=TILE,
    )


STATIC_CASES = [
    _added_case(),
    sums_case(_segmentation_sums_fwd_kernel, 1, 4, "fp32", coarse=False),
    sums_case(_segmentation_sums_fwd_kernel, 3, 9, "bf16", coarse=False),
    sums_case(_segmentation_sums_fwd_kernel, 3, 9, "fp32", coarse=True),
    sums_case(_segmentation_sums_fwd_kernel, 3, 9, "fp32", coarse=True, launch=1),
    *(sums_case(_segmentation_sums_fwd_kernel, 1, 4, "fp32", coarse=True, choice=c) for c in FORWARD_CHOICES[1:]),
]
