"""The plain U-Net of nnU-Net in two dimensions.

Source: Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation,
Nature Methods 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from trifuse.architectures.storage.pretrained import Pretrained, weights_generator
from trifuse.blocks.image_input import check_image
from trifuse.blocks.plain_unet import PlainUNetDecoder, PlainUNetEncoder, check_sides, planned_features, planned_stages

_MOST_STAGES = 32  # each halves an image: no side of one has more bits


@dataclass(frozen=True)
class PlainUNetConfig:
    """Everything that defines a `PlainUNet`; the defaults are what nnU-Net plans for patches of 256 x 256 pixels.

    Args:
        in_channels: channels of the images.
        num_classes: at least 2, the background included.
        image_size: side in pixels of the images it is meant for, which decides how often they are halved.
        base_dim: channels of the first stage. Each further stage has twice as many, up to ``max_dim``.
        max_dim: largest number of channels of a stage.
        num_stages: number of stages; None leaves it to ``image_size``.
        init_seed: seed of all random weights.

    Raises:
        ValueError: a value that is not allowed, or an image size that the stages cannot halve.
    """

    in_channels: int = 1
    num_classes: int = 4
    image_size: int = 256
    base_dim: int = 32
    max_dim: int = 512
    num_stages: int | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("in_channels", 1), ("num_classes", 2), ("image_size", 8), ("base_dim", 1), ("max_dim", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.num_stages is not None and not 2 <= self.num_stages <= _MOST_STAGES:
            raise ValueError(f"num_stages must be at least 2, and at most {_MOST_STAGES}, got {self.num_stages}")
        step = 2 ** (len(self.features) - 1)
        if self.image_size % step or self.image_size == step:
            fitting = max(-(-self.image_size // step), 2) * step
            raise ValueError(
                f"image_size must be a multiple of {step}, at least {2 * step}, for {len(self.features)} stages, got "
                f"{self.image_size}; use {fitting}, or fewer stages (num_stages)"
            )

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of the stages, finest first."""
        stages = planned_stages(self.image_size) if self.num_stages is None else self.num_stages
        return planned_features(stages, self.base_dim, self.max_dim)


class PlainUNet(Pretrained, nn.Module):
    """Segment images (B, C, H, W) into logits (B, K, H, W), or, while training, into logits at every resolution.

    Attributes:
        encoder: the `PlainUNetEncoder`.
        decoder: the `PlainUNetDecoder`.

    Source: Isensee et al., nnU-Net, Nature Methods 2021.
    """

    architecture: ClassVar[str] = "plain_unet"
    config_type: ClassVar[type] = PlainUNetConfig

    def __init__(self, config: PlainUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PlainUNetEncoder(config.in_channels, config.features)
        self.decoder = PlainUNetDecoder(config.features, config.num_classes)
        generator = weights_generator(config.init_seed)
        self.encoder.reset_parameters(generator)
        self.decoder.reset_parameters(generator)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Segment images of shape (B, C, H, W), whose sides all stages can halve.

        Returns:
            In evaluation logits (B, K, H, W); in training a list of logits (B, K, H / 2^i, W / 2^i), full resolution
            first.

        Raises:
            ShapeError: not a batch of images, not the declared channels, or sides that are refused.
        """
        check_image("PlainUNet", image, self.config.in_channels)
        check_sides("PlainUNet", image, len(self.config.features))
        logits = self.decoder(self.encoder(image), all_heads=self.training)
        return logits if self.training else logits[0]


def plain_unet(num_classes: int = 4, in_channels: int = 1, image_size: int = 256, **options: Any) -> PlainUNet:
    """Build what nnU-Net plans for 2D patches of ``image_size``; ``options`` are fields of `PlainUNetConfig`."""
    return PlainUNet(PlainUNetConfig(in_channels, num_classes, image_size, **options))
