"""Every network, as small as it can be made, with a batch, the forward pass and the loss that it is trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.architectures.dino_unet.model import DinoUNet, DinoUNetConfig
from trifuse.architectures.dino_unet.variants import EncoderShape
from trifuse.architectures.fias.model import Fias, FiasConfig
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.architectures.plain_unet.model import PlainUNet, PlainUNetConfig
from trifuse.architectures.taff_unet.config import TaffUNetConfig
from trifuse.architectures.taff_unet.ecg_autoencoder import EcgAutoencoder, EcgAutoencoderConfig
from trifuse.architectures.taff_unet.model import TaffUNet
from trifuse.architectures.taff_unet.pretrain import ReconstructionLoss
from trifuse.architectures.taff_unet.train import run_with_side_inputs
from trifuse.architectures.taff_unet.variants import SETTINGS
from trifuse.architectures.training.losses import MutationLoss, SegmentationLoss
from trifuse.architectures.training.scar_losses import ScarLoss
from trifuse.architectures.training.step import forward_image, forward_with_side_inputs

CLASSES = 3
BEAT = EcgAutoencoderConfig(time_steps=16, z_dim=4, base_dim=4, downsample=1, dropout=0.0)


@dataclass(frozen=True)
class TinyNetwork:
    """A network and what belongs to a step with it.

    Attributes:
        make: builds it, on the default device.
        batch: makes a batch of as many samples as asked for.
        loss: of the outputs, as `fit` calls it.
        forward: what `fit` computes from a batch.
        predict: what evaluation computes from a batch.
        kernels: whether it uses operators that have Triton kernels.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    loss: Callable[..., Tensor]
    forward: Callable[[Any, dict[str, Any]], Any] = forward_image
    predict: Callable[[Any, dict[str, Any]], Any] = forward_with_side_inputs
    kernels: bool = True

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a training step."""
        return self.loss(self.forward(model, dict(batch)), batch, None)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def classes(*shape: int) -> Tensor:
    return torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(sum(shape)))


def images(channels: int, side: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda samples: {"image": drawn(samples, channels, side, side), "target": classes(samples, side, side)}


def dino(**options: Any) -> TinyNetwork:
    shape = EncoderShape(embed_dim=16, depth=3, num_heads=2, native_grid=4)
    small = {"channels": (8, 4), "bottleneck_dim": 8, "top_k": 2, "num_classes": CLASSES}
    config = DinoUNetConfig(**{"variant": shape, **small, **options})
    return TinyNetwork(lambda: DinoUNet(config), images(3, 28), SegmentationLoss())


def fias(**options: Any) -> TinyNetwork:
    shape = DilateFormerShape(embed_dim=6, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))
    small = {"decoder_heads": (2, 2, 2, 2), "num_classes": CLASSES}
    config = FiasConfig(**{"variant": shape, **small, **options})
    return TinyNetwork(lambda: Fias(config), images(1, 32), MutationLoss())


def taff(setting: str, absent: bool = False) -> TinyNetwork:
    """In a batch with absent ECGs every second one is missing, and NaN stands in its place."""
    config = TaffUNetConfig(setting, CLASSES, image_size=8, base_dim=4, fusion_stage=1, ecg=BEAT)

    def batch(samples: int) -> dict[str, Tensor]:
        made = images(1, 8)(samples)
        if config.takes_prior:
            made["prior"] = (drawn(samples, 17, 8, 8) > 1).to(torch.uint8)
        if config.takes_ecg:
            made["ecg"] = drawn(samples, 12, BEAT.time_steps)
            made["interval"] = drawn(samples).abs() * 30
        if absent:
            made["has_ecg"] = torch.arange(samples) % 2 == 0
            for name in ("ecg", "interval"):
                made[name][~made["has_ecg"]] = torch.nan
        return made

    return TinyNetwork(lambda: TaffUNet(config), batch, ScarLoss(warmup_epochs=0), run_with_side_inputs)


def autoencoder() -> TinyNetwork:
    def batch(samples: int) -> dict[str, Tensor]:
        ecg = drawn(samples, 12, BEAT.time_steps)
        return {"ecg": ecg, "target": ecg.clone(), "usable": drawn(samples, 12) > -1}

    return TinyNetwork(
        lambda: EcgAutoencoder(replace(BEAT, dropout=0.2)),
        batch,
        ReconstructionLoss(mask_padding=True),
        forward=lambda model, batch: model(batch["ecg"]),
        predict=lambda model, batch: model(batch["ecg"]),
        kernels=False,
    )


NETWORKS = {
    "dino_unet": dino(),
    "dino_unet with fixed blocks": dino(blocks=(2, 0)),
    "dino_unet streaming": dino(stream_fusion=True),
    "dino_unet streaming twice": dino(stream_fusion=True, stream_gradient="recompute"),
    "dino_unet streaming skips alone": dino(stream_fusion=True, bottleneck="last"),
    "ecg_autoencoder": autoencoder(),
    "fias": fias(),
    "plain_unet": TinyNetwork(
        lambda: PlainUNet(PlainUNetConfig(1, CLASSES, image_size=16, base_dim=4)), images(1, 16), SegmentationLoss()
    ),
    **{f"taff_unet {setting}": taff(setting) for setting in SETTINGS},
    "taff_unet full, some without an ECG": taff("full", absent=True),
}
"""The networks by name; every architecture has one of its own name or more, the others are its variants."""
