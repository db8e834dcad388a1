"""The loss over all subsets: one fused operator against one loss for each subset."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from trifuse.kernels import mutation_loss

from .baselines import mutation_loss as baselines
from .baselines.dice_ce_loss import MONAI_MISSING
from .harness import TINY, Case, Comparison, Pass, clock


def loss_case(
    name: str, samples: int, sides: Sequence[int], full: int, dtype: torch.dtype, *, device: str, classes: int = 9
) -> Case:
    """Make a case of maps (samples, classes, side, side) and a target at ``full`` squared."""

    def arguments(device: torch.device) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        maps = [torch.randn(samples, classes, s, s, generator=generator, device=device).to(dtype) for s in sides]
        return maps, torch.randint(0, classes, (samples, full, full), generator=generator, device=device)

    size = f"({samples},{classes},{'/'.join(map(str, sides))})"
    return Case(f"{name}, {size} {str(dtype).removeprefix('torch.')}", arguments, (device,))


def maps_and_targets(maps_moved: int, targets_moved: int):
    """Return the bytes of all maps and of the target, each moved so many times, given the arguments."""
    return lambda maps, target: maps_moved * sum(m.nbytes for m in maps) + targets_moved * target.nbytes


COMPARISON = Comparison(
    name="mutation_loss",
    cases=[
        loss_case("full maps", 2, (256, 256, 256), 256, torch.float32, device="cpu"),
        loss_case("FIAS heads", 2, (16, 32, 64), 256, torch.float32, device="cpu"),
        loss_case("full maps", 24, (224, 224, 224), 224, torch.bfloat16, device="cuda"),
        loss_case("FIAS heads", 2, (16, 32, 64), 256, torch.float32, device="cuda"),
        loss_case("tiny", 1, (2, 4), 4, torch.float32, device=TINY, classes=2),
    ],
    passes=[
        Pass("forward", least_bytes=maps_and_targets(1, 1)),
        Pass("forward + backward", leaves=lambda maps, target: maps, least_bytes=maps_and_targets(3, 2)),
    ],
    providers={
        "seven losses": baselines.separate_losses,
        "torch.compile of seven losses": baselines.compiled_separate_losses,
        "MONAI DiceCELoss, seven times": baselines.separate_monai_losses,
        "trifuse": mutation_loss,
        "torch.compile of trifuse": torch.compile(mutation_loss, dynamic=False, fullgraph=True),
    },
    truth=baselines.separate_losses,
    missing={"MONAI DiceCELoss, seven times": MONAI_MISSING} if MONAI_MISSING else {},
)


@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_mutation_loss(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)
