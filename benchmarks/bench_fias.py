"""FIAS: a training step, against the published algorithms put together plainly; one set of weights, one draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trifuse.architectures.fias import Fias, FiasConfig
from trifuse.kernels import mutation_loss

from .fias_baseline import plain_fias, seven_losses
from .harness import Case, Comparison, Pass, clock

IMAGE_SIZE = 256
CLASSES = 9


class TrainingStep:
    """Forward pass, loss, backward pass and a step of Adam, of a network of its own.

    The first step returns all gradients as one vector, to be judged; later ones only the loss, so that copying the
    gradients is not timed. Step n draws what step n draws in every other network.
    """

    def __init__(self, network: Fias, loss: Callable[[list[Tensor], Tensor], Tensor]) -> None:
        self.network, self.loss = network.train(), loss
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-4)
        self.steps = 0

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        torch.manual_seed(self.steps)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = self.loss(self.network(image), target)
            loss.backward()
        self.optimizer.step()
        self.steps += 1
        if self.steps > 1:
            return loss.detach()
        return torch.cat([p.grad.flatten() for p in self.network.parameters() if p.grad is not None])


def step_case(batch: int, device: str) -> Case:
    def arguments(place: torch.device) -> tuple[dict[str, TrainingStep], Tensor, Tensor]:
        network = Fias(FiasConfig(num_classes=CLASSES)).to(place)
        steps = {
            "plain": TrainingStep(plain_fias(network), seven_losses),
            "truth": TrainingStep(plain_fias(network), seven_losses),
            "trifuse": TrainingStep(network, mutation_loss),
        }
        generator = torch.Generator(place).manual_seed(0)
        image = torch.randn(batch, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator, device=place)
        coarse = torch.randint(CLASSES, (batch, 1, 8, 8), generator=generator, device=place).float()
        target = torch.nn.functional.interpolate(coarse, (IMAGE_SIZE, IMAGE_SIZE)).squeeze(1).long()
        return steps, image, target

    name = f"FIAS, ({batch},1,{IMAGE_SIZE},{IMAGE_SIZE}), {CLASSES} classes, float32"
    return Case(name, arguments, devices=(device,))


def step_of(name: str) -> Callable[..., Tensor]:
    return lambda steps, image, target: steps[name](image, target)


TRAINING_STEP = Comparison(
    name="fias_training_step",
    cases=[step_case(2, "cpu"), step_case(2, "cuda"), step_case(16, "cuda")],
    passes=[Pass("forward, loss, backward and Adam")],
    providers={"published algorithms, plainly": step_of("plain"), "trifuse": step_of("trifuse")},
    truth=step_of("truth"),
    exact=False,
    depth=100,  # in float32 either form is up to 1.5e-3 from its gradient in float64, where the two agree to 1e-14
)


@pytest.mark.benchmark(timer=clock)
@TRAINING_STEP.parametrize()
def test_training_step(show, case, timed, provider):
    show(TRAINING_STEP, case, timed, provider)
