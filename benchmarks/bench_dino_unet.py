"""DINO U-Net: its encoder, a training step, and a volume's inference, against transformers' DINOv2."""

from __future__ import annotations

import atexit
import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.volumes.geometry import Geometry
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig
from trifuse.architectures.dino_unet.encoder import DinoV2Encoder
from trifuse.architectures.evaluation.predict import predict_volume
from trifuse.architectures.training.feature_cache import FeatureCache
from trifuse.architectures.training.losses import dice_ce_nnunet

from .baselines.dino_unet import TransformersDinoUNet
from .baselines.dinov2 import TransformersEncoder, encoder_pair, with_eager_attention
from .harness import TINY, Case, Comparison, Pass, clock, default_device

IMAGE_SIZE = 448
SPACING_MM = (2.5, 0.625, 0.625)


def encoder_dtype() -> torch.dtype:
    return torch.bfloat16 if default_device().type == "cuda" else torch.float32


class Networks(NamedTuple):
    """Forms of one network on one set of weights."""

    ours: DinoUNet
    streaming: DinoUNet
    composed: TransformersDinoUNet
    sdpa: TransformersEncoder
    eager: TransformersEncoder


@cache
def networks(variant: str) -> Networks:
    """Return all forms of a network of random weights."""
    dtype, device = encoder_dtype(), default_device()
    ours, theirs = encoder_pair(variant)
    config = DinoUNetConfig(variant=variant, pos_mode="size", encoder_dtype=str(dtype).removeprefix("torch."))
    network = DinoUNet(config)
    network.encoder.load_state_dict(ours.state_dict())
    network.to(device)
    theirs.to(device, dtype)
    streaming = copy.copy(network)
    streaming.config = replace(config, stream_fusion=True)
    return Networks(network, streaming, TransformersDinoUNet(network, theirs), theirs, with_eager_attention(theirs))


@cache
def narrow_encoder(variant: str) -> DinoV2Encoder:
    """Return our encoder with its weights in bfloat16: half the memory."""
    return copy.deepcopy(networks(variant).ours.encoder).to(torch.bfloat16)


def images(batch: int, device: torch.device, side: int = IMAGE_SIZE) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(batch, 3, side, side, generator=generator, device=device)


# -------------------------------------------------------------------------------------------------- the encoder


def encode(variant: str, image: Tensor) -> Tensor:
    return networks(variant).ours.encoder(image, [-1])["features"][0]


def encode_narrowly(variant: str, image: Tensor) -> Tensor:
    return narrow_encoder(variant)(image, [-1])["features"][0]


def encode_with_sdpa(variant: str, image: Tensor) -> Tensor:
    return networks(variant).sdpa(image.to(encoder_dtype()))


def encode_eagerly(variant: str, image: Tensor) -> Tensor:
    return networks(variant).eager(image.to(encoder_dtype()))


def encoder_case(variant: str, batch: int, device: str, side: int = IMAGE_SIZE) -> Case:
    return Case(
        f"DINOv2 {variant}, ({batch},3,{side},{side})",
        lambda place: (variant, images(batch, place, side)),
        devices=(device,),
    )


ENCODER = Comparison(
    name="dinov2_encoder",
    cases=[
        encoder_case("small", 1, "cpu"),
        encoder_case("base", 1, "cpu"),
        encoder_case("base", 32, "cuda"),
        encoder_case("large", 32, "cuda"),
        encoder_case("tiny", 2, TINY, 28),
    ],
    passes=[Pass("last block's tokens")],
    providers={
        "transformers, eager attention": encode_eagerly,
        "transformers, SDPA": encode_with_sdpa,
        "trifuse": encode,
        "trifuse, weights in bfloat16": encode_narrowly,
    },
    truth=encode_with_sdpa,
    missing={"trifuse, weights in bfloat16": "on a GPU all forms have them"}
    if encoder_dtype() == torch.bfloat16
    else {},
    exact=False,
    kernels=False,
)


# ----------------------------------------------------------------------------------------------- the training step


def trained(variant: str, image: Tensor, target: Tensor) -> list[Tensor]:
    return [parameter for parameter in networks(variant).ours.parameters() if parameter.requires_grad]


def step_of(form: str) -> Callable[..., Tensor]:
    def loss(variant: str, image: Tensor, target: Tensor) -> Tensor:
        networks(variant).ours.train()  # its decoder is everybody's
        return dice_ce_nnunet(getattr(networks(variant), form)(image), target)

    return loss


class Slices(Dataset[dict[str, Tensor]]):
    """The images of a step, one by one."""

    def __init__(self, batch: int) -> None:
        self.images = images(batch, torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index]}


@cache
def cached(variant: str, batch: int) -> FeatureCache:
    """Return a cache of the features of a step's images, in a folder that lasts as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="trifuse-features-")
    atexit.register(folder.cleanup)
    network = networks(variant).ours
    return FeatureCache(network, Slices(batch), Path(folder.name), dtype=torch.float32, device=default_device().type)


def step_from_the_cache(variant: str, image: Tensor, target: Tensor) -> Tensor:
    """Read the features of every image from the disk, as a run without workers does, and train on them."""
    network, features = networks(variant).ours.train(), cached(variant, len(image))
    samples = [features[index]["features"] for index in range(len(image))]
    maps = [torch.stack(same).to(image.device) for same in zip(*samples, strict=True)]
    logits = network.forward_features(maps, network.encoder.grid_of(image), image)
    return dice_ce_nnunet(logits, target)


def step_case(variant: str, batch: int, device: str, side: int = IMAGE_SIZE) -> Case:
    def arguments(place: torch.device) -> tuple[str, Tensor, Tensor]:
        target = torch.zeros(batch, side, side, dtype=torch.int64, device=place)
        target[:, side // 3 : side * 5 // 9, side * 2 // 5 : side * 2 // 3] = 1
        return variant, images(batch, place, side), target

    return Case(f"DINO U-Net {variant}, ({batch},3,{side},{side})", arguments, devices=(device,))


TRAINING_STEP = Comparison(
    name="dino_unet_training_step",
    cases=[
        step_case("small", 1, "cpu"),
        step_case("base", 32, "cuda"),
        step_case("giant", 8, "cuda"),
        step_case("tiny", 2, TINY, 28),
    ],
    passes=[Pass("forward, loss and backward", leaves=trained, joined=True)],
    providers={
        "transformers, stack + einsum": step_of("composed"),
        "trifuse": step_of("ours"),
        "trifuse, streaming fusion": step_of("streaming"),
        "trifuse, features from the cache": step_from_the_cache,
    },
    truth=step_of("composed"),
    missing={
        "trifuse, features from the cache": "its batch of features is larger than a page cache should be asked for"
    }
    if default_device().type == "cuda"
    else {},
    exact=False,
    depth=50,
)


# ------------------------------------------------------------------------------------------------ a volume


def predict_with(form: str) -> Callable[..., Tensor]:
    def predict(variant: str, volume: Volume, batch: int, side: int) -> Tensor:
        network = getattr(networks(variant), form)
        return torch.from_numpy(
            predict_volume(network, volume, Preprocessing(image_size=side), batch, default_device())
        )

    return predict


def volume_case(variant: str, slices: int, batch: int, device: str, voxels: int = 320, side: int = IMAGE_SIZE) -> Case:
    def arguments(place: torch.device) -> tuple[str, Volume, int, int]:
        values = np.random.default_rng(0).gamma(2.0, 100.0, (slices, voxels, voxels)).astype(np.float32)
        shape = (voxels, voxels, slices)
        geometry = Geometry(shape, np.eye(4), axes=(2, 1, 0), flips=(False, False, False), header=None)
        return variant, Volume(values, SPACING_MM, geometry), batch, side

    return Case(f"DINO U-Net {variant}, {slices} slices of {voxels}x{voxels}", arguments, devices=(device,))


VOLUME = Comparison(
    name="dino_unet_volume",
    cases=[
        volume_case("small", 2, 2, "cpu"),
        volume_case("base", 88, 8, "cuda"),
        volume_case("tiny", 2, 2, TINY, voxels=16, side=28),
    ],
    passes=[Pass("labels of a volume")],
    providers={
        "transformers, stack + einsum": predict_with("composed"),
        "trifuse": predict_with("ours"),
        "trifuse, streaming fusion": predict_with("streaming"),
    },
    truth=predict_with("composed"),
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
