"""TAFF-UNet and the plain U-Net: training step and inference against the composition as written; one set of weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig
from trifuse.architectures.taff_unet import TaffUNet, TaffUNetConfig
from trifuse.architectures.training.losses import SegmentationLoss

from .baselines.taff_unet import AsWritten, loss_as_written
from .harness import TINY, Case, Comparison, Pass, clock

CLASSES = 4
LOSS = SegmentationLoss()
Networks = tuple[nn.Module, nn.Module]


def inputs_of(network: nn.Module, batch: int, side: int, place: torch.device) -> tuple[Tensor, ...]:
    """Return images, and for TAFF-UNet their priors, ECGs and days."""
    generator = torch.Generator(place).manual_seed(0)
    image = torch.randn(batch, 1, side, side, generator=generator, device=place)
    if isinstance(network, PlainUNet):
        return (image,)
    prior = torch.zeros(batch, 17, side, side, device=place)
    prior[:, 3, side // 4 : side // 2, side // 4 : side // 2] = 1
    ecg = torch.randn(batch, 12, 608, generator=generator, device=place)
    return image, prior, ecg, torch.linspace(0, 60, batch, device=place)


def case(make: Callable[[], nn.Module], name: str, batch: int, side: int, device: str) -> Case:
    def arguments(place: torch.device) -> tuple[Networks, tuple[Tensor, ...], Tensor]:
        network = make().to(place)
        target = torch.zeros(batch, side, side, dtype=torch.int64, device=place)
        target[:, side // 4 : side // 2, side // 3 : side // 2] = 1
        return (network, AsWritten(network)), inputs_of(network, batch, side, place), target

    return Case(f"{name}, ({batch},1,{side},{side}) float32", arguments, devices=(device,))


def taff(base_dim: int, side: int) -> Callable[[], nn.Module]:
    return lambda: TaffUNet(TaffUNetConfig("full", CLASSES, side, base_dim))


def plain(base_dim: int, side: int) -> Callable[[], nn.Module]:
    return lambda: PlainUNet(PlainUNetConfig(1, CLASSES, side, base_dim))


CASES = [
    case(taff(16, 128), "TAFF-UNet of 16 channels", 2, 128, "cpu"),
    case(plain(16, 128), "plain U-Net of 16 channels", 2, 128, "cpu"),
    case(taff(32, 256), "TAFF-UNet", 2, 256, "cuda"),
    case(taff(32, 256), "TAFF-UNet", 32, 256, "cuda"),
    case(plain(32, 256), "plain U-Net", 16, 256, "cuda"),
    case(taff(4, 32), "tiny TAFF-UNet", 2, 32, TINY),
]


def parameters_of(networks: Networks, inputs: tuple[Tensor, ...], target: Tensor) -> list[Tensor]:
    """Return what a step of segmentation gives a gradient: all but the ECG's decoder and the coarsest head."""
    without = ("ecg.decoder", "decoder.seg_layers.0")
    return [p for name, p in networks[0].named_parameters() if not name.startswith(without)]


def step(networks: Networks, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
    torch.manual_seed(0)  # of the dropout of the ECG's attentions
    return LOSS(networks[0].train()(*inputs), {"target": target}, None)


def step_as_written(networks: Networks, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
    torch.manual_seed(0)
    return loss_as_written(networks[1].train()(*inputs), target)


def labels(networks: Networks, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
    return networks[0].eval()(*inputs).argmax(1)


def labels_as_written(networks: Networks, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
    return networks[1].eval()(*inputs).argmax(1)


TRAINING_STEP = Comparison(
    name="taff_unet_training_step",
    cases=CASES,
    passes=[Pass("forward, loss and backward", leaves=parameters_of, joined=True)],
    providers={"as written": step_as_written, "trifuse": step},
    truth=step_as_written,
    exact=False,
    depth=100,
)

INFERENCE = Comparison(
    name="taff_unet_inference",
    cases=CASES,
    passes=[Pass("labels of a batch")],
    providers={"as written": labels_as_written, "trifuse": labels},
    truth=labels_as_written,
    exact=False,
)


@pytest.mark.benchmark(timer=clock)
@TRAINING_STEP.parametrize()
def test_training_step(show, case, timed, provider):
    show(TRAINING_STEP, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@INFERENCE.parametrize()
def test_inference(show, case, timed, provider):
    show(INFERENCE, case, timed, provider)
