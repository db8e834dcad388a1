"""The kernel of Dice and cross-entropy as it is compiled for the gate, and what the pass moves."""

from __future__ import annotations

from trifuse.kernels.gpu import tuning
from trifuse.kernels.gpu.segmentation_loss import CHOICES, _dice_ce_kernel

from .case import StaticCase, Traffic, in_form

_BYTES = "8 + 4 * K / (S * (2 * K + 1))"
TRAFFIC = [Traffic("losses", {"B": 24, "K": 9, "S": 7}, "B * S * (2 * K + 1)", _BYTES, _BYTES)]


def _case(
    subsets: int,
    classes: int,
    *,
    batch_dice: bool,
    weighted: bool,
    levels: bool = False,
    choice: tuning.Choice = CHOICES[0],
) -> StaticCase:
    switches: dict[str | tuple[int, ...], object] = {
        "LEVELS": subsets if levels else 1,
        "SUBSETS": subsets,
        "K": classes,
        "FIRST": 0 if batch_dice else 1,
        "BATCH_DICE": batch_dice,
        "SQUARED": batch_dice,
        "SAMPLES": choice["samples"],
        "COLUMNS": 1 << (classes - 1).bit_length(),
    }
    missing: dict[str | tuple[int, ...], object] = {"weight_stride": 1} | ({} if weighted else {"weights": None})
    missing |= {} if levels else {"shares": None}
    what = f"{subsets} {'level' if levels else 'subset'}{'s'[: subsets - 1]}"
    name = f"{what}, {'batch' if batch_dice else 'weighted samples'}"
    return StaticCase(
        name=in_form(name, choice, CHOICES),
        kernel=_dice_ce_kernel,
        signature={
            "sums": "*fp32",
            "true": "*fp32",
            "weights": "*fp32" if weighted else "constexpr",
            "shares": ("fp32",) * subsets if levels else "constexpr",
            **dict.fromkeys(("losses", "slopes"), "*fp32"),
            "samples": "i32",
            "weight_stride": "constexpr",
            **dict.fromkeys(("w_ce", "w_dice", "best", "smooth", "tiny"), "fp32"),
            **dict.fromkeys(map(str, switches), "constexpr"),
        },
        constants=missing | switches,
        aligned=("sums", "true", "weights", "losses", "slopes"),
    )


STATIC_CASES = [
    *(_case(7, 9, batch_dice=True, weighted=False, choice=choice) for choice in CHOICES),
    _case(1, 4, batch_dice=False, weighted=True),
    _case(5, 4, batch_dice=False, weighted=True, levels=True),
]
