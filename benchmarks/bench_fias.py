"""FIAS: training step and inference against the published algorithms put together plainly; one set of weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trifuse.architectures.fias import Fias, FiasConfig
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.kernels import mutation_loss, upsample_argmax

from .baselines.fias import labels_plainly, plain_fias, seven_losses
from .harness import TINY, Case, Comparison, Pass, clock

CLASSES = 9


class Networks(NamedTuple):
    """A network, and the published algorithms put together plainly on its parameters."""

    ours: Fias
    plain: Fias


SMALLEST = {
    "variant": DilateFormerShape(embed_dim=6, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3)),
    "decoder_heads": (2, 2, 2, 2),
    "num_classes": 2,
}


def case(name: str, batch: int, size: int, device: str, **options: Any) -> Case:
    config = FiasConfig(**{"variant": name, "num_classes": CLASSES, **options})
    classes = config.num_classes

    def arguments(place: torch.device) -> tuple[Networks, Tensor, Tensor]:
        network = Fias(config).to(place)
        generator = torch.Generator(place).manual_seed(0)
        image = torch.randn(batch, 1, size, size, generator=generator, device=place)
        coarse = torch.randint(classes, (batch, 1, 8, 8), generator=generator, device=place).float()
        target = torch.nn.functional.interpolate(coarse, (size, size)).squeeze(1).long()
        return Networks(network, plain_fias(network)), image, target

    return Case(f"FIAS {name}, ({batch},1,{size},{size}), {classes} classes, float32", arguments, devices=(device,))


CASES = [
    case("tiny", 1, 224, "cpu"),
    case("tiny", 2, 128, "cpu"),
    case("tiny", 2, 256, "cuda"),
    case("tiny", 16, 256, "cuda"),
    case("smallest", 4, 32, TINY, **SMALLEST),  # of two, batch norms of the coarsest maps would be of two numbers
]


def parameters_of(networks: Networks, image: Tensor, target: Tensor) -> list[Tensor]:
    """Return the parameters that a step gives a gradient."""
    loss = step(networks, image, target)
    parameters = list(networks.ours.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def step(networks: Networks, image: Tensor, target: Tensor) -> Tensor:
    torch.manual_seed(0)  # all forms draw the same
    return mutation_loss(networks.ours.train()(image), target)


def step_plainly(networks: Networks, image: Tensor, target: Tensor) -> Tensor:
    torch.manual_seed(0)
    return seven_losses(networks.plain.train()(image), target)


def labels(networks: Networks, image: Tensor, target: Tensor) -> Tensor:
    return upsample_argmax(networks.ours.eval().head_maps(image), (image.shape[2], image.shape[3]))


def labels_by_parts(networks: Networks, image: Tensor, target: Tensor) -> Tensor:
    return labels_plainly(networks.plain.eval().head_maps(image), (image.shape[2], image.shape[3]))


TRAINING_STEP = Comparison(
    name="fias_training_step",
    cases=CASES,
    passes=[Pass("forward, loss and backward", leaves=parameters_of, joined=True)],
    providers={"published algorithms, plainly": step_plainly, "trifuse": step},
    truth=step_plainly,
    exact=False,
    depth=100,  # batch norms over few numbers amplify what float32 rounds; on the smallest case the two differ by 8e-6
)

INFERENCE = Comparison(
    name="fias_inference",
    cases=CASES,
    passes=[Pass("labels of a batch")],
    providers={"published algorithms, plainly": labels_by_parts, "trifuse": labels},
    truth=labels_by_parts,
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
