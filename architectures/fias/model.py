"""FIAS: two encoders, one of attention and one of convolutions, fused at four sizes; a mixing-attention decoder.

Source: FIAS, feature imbalance-aware medical image segmentation (the paper's Fig. 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.architectures.storage.pretrained import Pretrained, weights_generator
from trifuse.blocks.context_aware_fusion import ChannelWeights, SpatialPool
from trifuse.blocks.conv_norm_relu import init_convs
from trifuse.blocks.depthwise_multi_kernel import KsGroups
from trifuse.blocks.image_input import channels_last, check_image
from trifuse.blocks.mixing_attention import PositionalEncoding
from trifuse.blocks.monte_carlo_attention import Draw, Gate
from trifuse.kernels.choices import check_choice, check_choices
from trifuse.kernels.errors import ShapeError

from .decoder import BottleneckKind, FiasDecoder
from .dilateformer import REDUCTION, DilateFormer
from .encoder import Adapter, Fusion, InputAdapter, LocalEncoder, make_fusion
from .variants import DILATIONS, VARIANTS, DilateFormerShape, check_dilations


@dataclass(frozen=True)
class FiasConfig:
    """Everything that defines a `Fias`; the defaults are the paper's where it speaks.

    Args:
        variant: the DilateFormer, whose channels C, 2C, 4C, 8C all other parts share: ``"tiny"``, ``"small"``,
            ``"base"``, ``"nano"`` (for tests and the demo), or a `DilateFormerShape`.
        encoder_checkpoint: a folder of converted DilateFormer weights to start from; None starts from random weights.
            Where the weights once came from is not saved with the network.
        num_classes: 2 or more for a softmax, 1 for a sigmoid.
        in_channels: channels of the images.
        input_adapter: how they become three: ``"conv"``, a 1x1 convolution; ``"merit"``, one that is normalised and
            rectified; ``"repeat"`` a grey image; ``"none"``, for images of three channels.
        pad: continue an image whose sides are no multiples of 32 by reflection at the right and at the bottom, and crop
            the logits; else it is refused.
        out_norm: normalise each map of the DilateFormer, not only the last.
        dilations: of the windows in its first two stages, each for an equal share of the attention heads.
        drop_path: highest probability with which a sample skips a branch of the DilateFormer while training.
        no_dmk: the network without its convolutional encoder: ``"dup"`` fuses the DilateFormer's maps with themselves,
            ``"bypass"`` does without fusion; None keeps the encoder.
        dmk_kernels: sides of the parallel depthwise kernels.
        dmk_depth: blocks of the convolutional encoder at each size.
        ks_groups: its 3x3 convolutions: ``"dense"``, or ``"depthwise"``.
        fusion: of the two encoders' maps: ``"caf"``, ``"sum"`` or ``"concat"``.
        spatial_pool: how the fusion's spatial weight gathers: over ``"channel"``, also over 3x3 pixels (``"local3"``),
            or by a convolution to one channel (``"none"``).
        spatial_kernel: side of the convolution of the spatial weight.
        max_pool: whether the fusion's channel weight sees the maximum beside the mean.
        pre_conv: whether a 1x1 convolution comes before it.
        channel_weights: whether what that weight sees is ``"normalised"``, its logits starting at zero, or taken as the
            equations are written (``"literal"``), which saturates it from the start; see `ContextAwareFusion`.
        bottleneck: what the decoder starts from: the coarsest map after a convolution (``"conv"``), as it is
            (``"none"``), or after one at half its size (``"down"``).
        mixatt: whether the decoder's blocks attend; else they are two convolutions each.
        decoder_heads: attention heads of its four blocks, coarsest first.
        pos: what tells its attention positions: ``"none"``, or a depthwise convolution, ``"dwconv"``.
        dropout: of its joined maps.
        gate: what Monte Carlo attention multiplies by: a squeeze-and-excitation of the pooled map, ``"se"``, or the map
            itself, ``"none"``.
        draw: one draw for the ``"batch"``, or one for each ``"sample"``.
        order_shuffle: whether the pixels are shuffled before they are pooled.
        scales: sides of the pooled maps to draw from.
        scale_probs: their probabilities; None makes them equal.
        norm: of the convolutional encoder, the adapter and the decoder: ``"batch"`` or ``"group"``.
        init_seed: seed of all random weights.

    Raises:
        ValueError: a value that is not allowed, or options that contradict each other.
    """

    variant: str | DilateFormerShape = "tiny"
    encoder_checkpoint: str | None = field(default=None, metadata={"saved": False})
    num_classes: int = 9
    in_channels: int = 1
    input_adapter: Adapter = "conv"
    pad: bool = False
    out_norm: bool = True
    dilations: tuple[int, ...] = DILATIONS
    drop_path: float = 0.1
    no_dmk: Literal["dup", "bypass"] | None = None
    dmk_kernels: tuple[int, ...] = (5, 7)
    dmk_depth: int = 1
    ks_groups: KsGroups = "dense"
    fusion: Fusion = "caf"
    spatial_pool: SpatialPool = "channel"
    spatial_kernel: int = 7
    max_pool: bool = True
    pre_conv: bool = True
    channel_weights: ChannelWeights = "normalised"
    bottleneck: BottleneckKind = "conv"
    mixatt: bool = True
    decoder_heads: tuple[int, ...] = (8, 6, 4, 2)
    pos: PositionalEncoding = "none"
    dropout: float = 0.1
    gate: Gate = "se"
    draw: Draw = "batch"
    order_shuffle: bool = True
    scales: tuple[int, ...] = (1, 2, 3)
    scale_probs: tuple[float, ...] | None = None
    norm: Literal["batch", "group"] = "batch"
    init_seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.variant, DilateFormerShape):
            check_choice("variant", self.variant, VARIANTS)
        check_choices(self)
        for name in ("num_classes", "in_channels", "dmk_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("drop_path", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.dmk_kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in self.dmk_kernels):
            raise ValueError(f"dmk_kernels must be odd numbers, at least one, got {self.dmk_kernels}")
        if self.spatial_kernel < 1 or self.spatial_kernel % 2 == 0:
            raise ValueError(f"spatial_kernel must be an odd number, got {self.spatial_kernel}")
        check_dilations(self.encoder_shape, self.dilations)
        self._check_adapter()
        self._check_draw()
        self._check_heads()

    def _check_adapter(self) -> None:
        wanted = {"repeat": 1, "none": 3}.get(self.input_adapter, self.in_channels)
        if self.in_channels != wanted:
            raise ValueError(
                f"input_adapter {self.input_adapter!r} takes images of {wanted} channels, got in_channels "
                f"{self.in_channels}; use 'conv'"
            )

    def _check_draw(self) -> None:
        if not self.scales or min(self.scales) < 1:
            raise ValueError(f"scales must be positive, got {self.scales}")
        probabilities = self.scale_probs
        if probabilities is not None and (
            len(probabilities) != len(self.scales) or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6
        ):
            raise ValueError(f"scale_probs must be a probability for each of {self.scales}, got {probabilities}")

    def _check_heads(self) -> None:
        if len(self.decoder_heads) != len(self.dims):
            raise ValueError(
                f"decoder_heads must be {len(self.dims)} numbers, coarsest first, got {self.decoder_heads}"
            )
        for block, (dim, heads) in enumerate(zip(self.dims[::-1], self.decoder_heads, strict=True), start=1):
            if heads < 1 or dim % heads:
                raise ValueError(f"decoder_heads: {heads} heads do not divide the {dim} channels of block {block}")

    @property
    def encoder_shape(self) -> DilateFormerShape:
        """The DilateFormer, named or not."""
        return self.variant if isinstance(self.variant, DilateFormerShape) else VARIANTS[self.variant]

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of the four levels, finest first."""
        return self.encoder_shape.dims

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: no other dilations, the fusion's equations as they are written."""
        return {"dilations": [*DILATIONS], "channel_weights": "literal", **values}


class Fias(Pretrained, nn.Module):
    """Segment images (B, C, H, W) into logits (B, K, H, W), or, while training, into the logits of three smaller sizes.

    Attributes:
        adapter: what brings images to three channels.
        global_encoder: the `DilateFormer`.
        local_encoder: the `LocalEncoder`; None without DMK.
        fusions: what fuses their maps, one for each size; empty where ``no_dmk`` is ``"bypass"``.
        decoder: the `FiasDecoder`.

    Source: FIAS, Fig. 1.
    """

    architecture: ClassVar[str] = "fias"
    config_type: ClassVar[type] = FiasConfig

    def __init__(self, config: FiasConfig) -> None:
        super().__init__()
        self.config = config
        generator = weights_generator(config.init_seed)
        self.adapter = InputAdapter(config.input_adapter, config.in_channels, config.norm)
        self.global_encoder = DilateFormer(
            config.variant,
            out_norm=config.out_norm,
            dilations=config.dilations,
            drop_path=config.drop_path,
            checkpoint=config.encoder_checkpoint,
            generator=generator,
        )
        self.local_encoder = None if config.no_dmk else _local_encoder(config)
        levels = () if config.no_dmk == "bypass" else config.dims
        self.fusions = nn.ModuleList([make_fusion(config.fusion, dim, **_caf_options(config)) for dim in levels])
        self.decoder = FiasDecoder(
            config.dims,
            config.decoder_heads,
            config.num_classes,
            mixing=config.mixatt,
            bottleneck=config.bottleneck,
            norm=config.norm,
            **_mixing_options(config),
        )
        init_convs(self.adapter, generator)
        if self.local_encoder is not None:
            init_convs(self.local_encoder, generator)
        for part in (*self.fusions, self.decoder):
            part.reset_parameters(generator)  # type: ignore[operator]

    def forward(
        self, image: Tensor, generator: torch.Generator | None = None, *, return_all: bool = False
    ) -> Tensor | list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Segment images of shape (B, C, H, W).

        Args:
            image: H and W multiples of 32, or of any size with ``pad``.
            generator: source of the Monte Carlo draws of a training pass; None means PyTorch's global one.
            return_all: also return the maps that the logits are the sum of; a training pass returns its maps anyway.

        Returns:
            In evaluation the summed logits (B, K, H, W), with ``return_all`` also the list of those of each head,
            upsampled to that size, coarsest first; in training what `head_maps` returns.

        Raises:
            ShapeError: not a batch of images, not the declared channels, or sides that are refused.
        """
        maps = self.head_maps(image, generator)
        if self.training:
            return maps
        maps = [_resize(x, (image.shape[2], image.shape[3])) for x in maps]
        logits = sum(maps[1:], start=maps[0])
        return (logits, maps) if return_all else logits

    def head_maps(self, image: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Return the logits of each head, coarsest first: (B, K, H/16, W/16), (B, K, H/8, W/8), (B, K, H/4, W/4).

        Of an image that had to be padded they are upsampled to its padded size and cropped to (B, K, H, W), because
        smaller maps would not align with it.
        """
        x = self.prepare(image)
        maps = self.decoder(self.encode(x), generator)
        if x.shape[2:] == image.shape[2:]:
            return maps
        height, width = image.shape[2:]
        return [_resize(logits, (x.shape[2], x.shape[3]))[..., :height, :width] for logits in maps]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the fused maps of prepared images, finest first: (B, C, H/4, W/4) to (B, 8C, H/32, W/32).

        With batch norms all maps from here to the heads have channels innermost in memory; other norms do not keep it.
        """
        x = self.adapter(x)
        if self.config.norm == "batch":
            x = channels_last(x)
        context = self.global_encoder(x)
        if not self.fusions:
            return context
        detail = context if self.local_encoder is None else self.local_encoder(x)
        return [fuse(a, b) for fuse, a, b in zip(self.fusions, context, detail, strict=True)]

    def prepare(self, image: Tensor) -> Tensor:
        """Check images (B, C, H, W), and pad them to multiples of 32 where that is wanted."""
        check_image("Fias", image, self.config.in_channels)
        height, width = image.shape[2:]
        right, bottom = -width % REDUCTION, -height % REDUCTION
        if not (right or bottom) or not self.config.pad:
            return image  # the encoder refuses a size that does not fit
        if right >= width or bottom >= height:
            raise ShapeError(
                f"Fias: an image of {height} x {width} pixels is too small to be continued by reflection to multiples "
                f"of {REDUCTION}; resize it to at least {REDUCTION // 2 + 1} x {REDUCTION // 2 + 1}"
            )
        return F.pad(image, (0, right, 0, bottom), mode="reflect")


def fias(**overrides: Any) -> Fias:
    """Build the paper's network on DilateFormer-tiny; ``overrides`` are fields of `FiasConfig`."""
    return Fias(FiasConfig(**overrides))


def _local_encoder(config: FiasConfig) -> LocalEncoder:
    return LocalEncoder(
        config.dims, config.norm, kernels=config.dmk_kernels, ks_groups=config.ks_groups, depth=config.dmk_depth
    )


def _caf_options(config: FiasConfig) -> dict[str, Any]:
    names = ("spatial_pool", "spatial_kernel", "max_pool", "pre_conv", "channel_weights")
    return {name: getattr(config, name) for name in names}


def _mixing_options(config: FiasConfig) -> dict[str, Any]:
    names = ("pos", "dropout", "gate", "draw", "order_shuffle", "scales", "scale_probs")
    return {name: getattr(config, name) for name in names}


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear")
