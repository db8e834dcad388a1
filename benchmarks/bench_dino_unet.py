"""DINO U-Net: its encoder, a training step, and a volume's inference, against transformers' DINOv2 with SDPA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trifuse.architectures.data.geometry import Geometry
from trifuse.architectures.data.volume import Volume
from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig
from trifuse.architectures.evaluation.predict import predict_volume
from trifuse.architectures.training.losses import dice_ce_nnunet

from .baselines import TransformersDinoUNet
from .dinov2_baseline import TransformersEncoder, encoder_pair
from .harness import Case, Comparison, Pass, clock, default_device

IMAGE_SIZE = 448
SPACING_MM = (2.5, 0.625, 0.625)


def encoder_dtype() -> torch.dtype:
    return torch.bfloat16 if default_device().type == "cuda" else torch.float32


@cache
def networks(variant: str) -> tuple[DinoUNet, DinoUNet, nn.Module, TransformersEncoder]:
    """Return our network, the same one streaming, transformers' counterpart, and its encoder: one set of weights."""
    dtype, device = encoder_dtype(), default_device()
    ours, theirs = encoder_pair(variant)
    config = DinoUNetConfig(variant=variant, pos_mode="size", encoder_dtype=str(dtype).removeprefix("torch."))
    network = DinoUNet(config)
    network.encoder.load_state_dict(ours.state_dict())
    network.to(device)
    theirs.to(device, dtype)
    streaming = copy.copy(network)
    streaming.config = replace(config, stream_fusion=True)
    return network, streaming, TransformersDinoUNet(network, theirs), theirs


def images(batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, device=device)


# -------------------------------------------------------------------------------------------------- the encoder


def encode(variant: str, image: Tensor) -> Tensor:
    network, *_ = networks(variant)
    return network.encoder(image, [-1])["features"][0]


def encode_with_transformers(variant: str, image: Tensor) -> Tensor:
    *_, theirs = networks(variant)
    return theirs(image.to(encoder_dtype()))


def encoder_case(variant: str, batch: int, device: str) -> Case:
    return Case(
        f"DINOv2 {variant}, ({batch},3,448,448)", lambda place: (variant, images(batch, place)), devices=(device,)
    )


ENCODER = Comparison(
    name="dinov2_encoder",
    cases=[encoder_case("base", 2, "cpu"), encoder_case("base", 32, "cuda"), encoder_case("large", 32, "cuda")],
    passes=[Pass("last block's tokens")],
    providers={"transformers, SDPA": encode_with_transformers, "trifuse": encode},
    truth=encode_with_transformers,
    exact=False,
)


# ----------------------------------------------------------------------------------------------- the training step


def training_step(network: nn.Module, trained: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Return the gradients of one step, as one vector: forward, loss, backward; the optimiser is the same for all."""
    trained.train()
    with torch.enable_grad():
        loss = dice_ce_nnunet(network(image), target)
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


def step_of(choice: int) -> Callable[..., Tensor]:
    def step(variant: str, image: Tensor, target: Tensor) -> Tensor:
        return training_step(networks(variant)[choice], networks(variant)[0], image, target)

    return step


def step_case(variant: str, batch: int, device: str) -> Case:
    def arguments(place: torch.device) -> tuple[str, Tensor, Tensor]:
        target = torch.zeros(batch, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int64, device=place)
        target[:, 150:250, 180:300] = 1
        return variant, images(batch, place), target

    return Case(f"DINO U-Net {variant}, ({batch},3,448,448)", arguments, devices=(device,))


TRAINING_STEP = Comparison(
    name="dino_unet_training_step",
    cases=[step_case("small", 1, "cpu"), step_case("base", 32, "cuda"), step_case("giant", 8, "cuda")],
    passes=[Pass("forward, loss and backward")],
    providers={
        "transformers, stack + einsum": step_of(2),
        "trifuse": step_of(0),
        "trifuse, streaming fusion": step_of(1),
    },
    truth=step_of(2),
    exact=False,
    depth=50,
)


# ------------------------------------------------------------------------------------------------ a volume


def predict_with(choice: int) -> Callable[..., Tensor]:
    def predict(variant: str, volume: Volume, batch: int) -> Tensor:
        network = networks(variant)[choice]
        return torch.from_numpy(predict_volume(network, volume, IMAGE_SIZE, batch, default_device()))

    return predict


def volume_case(variant: str, slices: int, batch: int, device: str) -> Case:
    def arguments(place: torch.device) -> tuple[str, Volume, int]:
        voxels = np.random.default_rng(0).gamma(2.0, 100.0, (slices, 320, 320)).astype(np.float32)
        geometry = Geometry((320, 320, slices), np.eye(4), axes=(2, 1, 0), flips=(False, False, False), header=None)
        return variant, Volume(voxels, SPACING_MM, geometry), batch

    return Case(f"DINO U-Net {variant}, {slices} slices of 320x320", arguments, devices=(device,))


VOLUME = Comparison(
    name="dino_unet_volume",
    cases=[volume_case("small", 4, 2, "cpu"), volume_case("base", 88, 8, "cuda")],
    passes=[Pass("labels of a volume")],
    providers={
        "transformers, stack + einsum": predict_with(2),
        "trifuse": predict_with(0),
        "trifuse, streaming fusion": predict_with(1),
    },
    truth=predict_with(2),
    exact=False,
)


@pytest.mark.benchmark(timer=clock)
@ENCODER.parametrize()
def test_encoder(show, case, timed, provider):
    show(ENCODER, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@TRAINING_STEP.parametrize()
def test_training_step(show, case, timed, provider):
    show(TRAINING_STEP, case, timed, provider)


@pytest.mark.benchmark(timer=clock)
@VOLUME.parametrize()
def test_volume(show, case, timed, provider):
    show(VOLUME, case, timed, provider)
