"""Dice and cross-entropy of one map: the fused operator against the loss as people write it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from trifuse.kernels import dice_ce_loss

from .baselines import dice_ce_loss as baselines
from .harness import TINY, Case, Comparison, Pass, clock


def loss_case(name: str, samples: int, classes: int, side: int, *, device: str) -> Case:
    """Make a case of one map, float32 as losses are given them, and a target of its size."""

    def arguments(device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(samples, classes, side, side, generator=generator, device=device)
        return logits, torch.randint(0, classes, (samples, side, side), generator=generator, device=device)

    return Case(f"{name}, ({samples},{classes},{side},{side}) float32", arguments, (device,))


MAPS_AND_TARGETS = [
    Pass("forward", least_bytes=lambda logits, target: logits.nbytes + target.nbytes),
    Pass(
        "forward + backward",
        leaves=lambda logits, target: [logits],
        least_bytes=lambda logits, target: 3 * logits.nbytes + 2 * target.nbytes,
    ),
]

fused = partial(dice_ce_loss, flavour="transunet", w_ce=0.6, w_dice=0.4)
fused_foreground = partial(dice_ce_loss, flavour="nnunet")

COMPARISON = Comparison(
    name="dice_ce_loss",
    cases=[
        loss_case("small", 2, 4, 64, device="cpu"),
        loss_case("one map", 2, 9, 256, device="cpu"),
        loss_case("one map", 2, 9, 224, device="cuda"),
        loss_case("one map", 24, 9, 224, device="cuda"),
        loss_case("tiny", 2, 4, 16, device=TINY),
    ],
    passes=MAPS_AND_TARGETS,
    providers={
        "written out": baselines.dice_and_cross_entropy,
        "torch.compile of written out": baselines.compiled_dice_and_cross_entropy,
        "MONAI DiceCELoss": baselines.monai_dice_ce,
        "trifuse": fused,
        "torch.compile of trifuse": torch.compile(fused, dynamic=False, fullgraph=True),
    },
    truth=baselines.dice_and_cross_entropy,
    missing={"MONAI DiceCELoss": baselines.MONAI_MISSING} if baselines.MONAI_MISSING else {},
)


FOREGROUND = Comparison(
    name="dice_ce_loss_nnunet",
    cases=[
        loss_case("one map", 2, 9, 256, device="cpu"),
        loss_case("one map", 24, 9, 224, device="cuda"),
        loss_case("tiny", 2, 4, 16, device=TINY),
    ],
    passes=MAPS_AND_TARGETS,
    providers={
        "written out": baselines.foreground_dice_and_cross_entropy,
        "torch.compile of written out": baselines.compiled_foreground_loss,
        "nnU-Net DC_and_CE_loss": baselines.nnunet_dice_ce,
        "trifuse": fused_foreground,
        "torch.compile of trifuse": torch.compile(fused_foreground, dynamic=False, fullgraph=True),
    },
    truth=baselines.foreground_dice_and_cross_entropy,
    missing={"nnU-Net DC_and_CE_loss": baselines.NNUNET_MISSING} if baselines.NNUNET_MISSING else {},
)


@pytest.mark.benchmark(timer=clock)
@FOREGROUND.parametrize()
def test_dice_ce_loss_of_nnunet(show, case, timed, provider):
    show(FOREGROUND, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_dice_ce_loss(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)
