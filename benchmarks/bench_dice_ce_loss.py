"""Dice and cross-entropy of one map: the fused operator against the loss as people write it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from trifuse.kernels import dice_ce_loss

from . import segmentation_loss_baselines as baselines
from .harness import Case, Comparison, Pass, clock


def loss_case(samples: int, classes: int, side: int, *, device: str) -> Case:
    """Make a case of one float32 map and a target of its size."""

    def arguments(device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(samples, classes, side, side, generator=generator, device=device)
        return logits, torch.randint(0, classes, (samples, side, side), generator=generator, device=device)

    return Case(f"one map, ({samples},{classes},{side},{side}) float32", arguments, (device,))


fused = partial(dice_ce_loss, flavour="transunet", w_ce=0.6, w_dice=0.4)

COMPARISON = Comparison(
    name="dice_ce_loss",
    cases=[loss_case(2, 9, 256, device="cpu"), loss_case(24, 9, 256, device="cuda")],
    passes=[Pass("forward"), Pass("forward + backward", leaves=lambda logits, target: [logits])],
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


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_dice_ce_loss(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)
