"""A DINO-UNet small enough for tests, and images for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig
from trifuse.architectures.dino_unet.variants import EncoderShape

SHAPE = EncoderShape(embed_dim=16, depth=6, num_heads=2, native_grid=3)
TINY = DinoUNetConfig(variant=SHAPE, channels=(8, 8, 4, 4), bottleneck_dim=8)
DEAD = {"bottleneck": "last", "skip_scale": "none"}


def network(**options) -> DinoUNet:
    return DinoUNet(replace(TINY, **options))


def double(**options) -> DinoUNet:
    return network(encoder_dtype="float64", **options).double()


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread_logits(model: DinoUNet, seed=0) -> None:
    """Make the block weights unequal, so that an index that is wrong is seen."""
    with torch.no_grad():
        model.fusion.logits.copy_(torch.randn(SHAPE.depth, generator=torch.Generator().manual_seed(seed)))


def backward(model: DinoUNet, image: torch.Tensor) -> torch.Tensor:
    logits = model(image)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return logits
