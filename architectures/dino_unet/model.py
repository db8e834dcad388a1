"""DINO-UNet: a frozen DINOv2, its blocks weighed and selected, a U-Net decoder that also sees the image.

Source: left-atrium segmentation from LGE-MRI with a frozen DINOv2 and learnable block fusion (the paper's Fig. 1).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.architectures.storage.pretrained import Pretrained, weights_generator
from trifuse.blocks.block_selection import Order, SelectedMaps, described, fixed_blocks
from trifuse.blocks.image_branch import resize_bilinear
from trifuse.blocks.image_input import check_image
from trifuse.blocks.normalization import Norm
from trifuse.blocks.plain_layers import as_its_class_says, dtype_of, is_plain
from trifuse.blocks.streamed_block_fusion import Receive
from trifuse.blocks.weighted_block_fusion import WeightedBlockFusion
from trifuse.kernels.choices import check_choice, check_choices
from trifuse.kernels.errors import ShapeError

from .backbone_encoder import BackboneEncoder, depth_of
from .decoder import Bottleneck, DinoUNetDecoder, FinalResize
from .dinov3_encoder import DinoV3Encoder
from .encoder import DinoV2Encoder, PositionMode
from .encoder_folder import describe_encoder
from .frozen_encoder import FrozenEncoder
from .variants import DINOV3_VARIANTS, VARIANTS, EncoderShape

SkipScale = Literal["renorm", "raw", "none"]
StreamGradient = Literal["project", "recompute"]
SizePolicy = Literal["error", "pad", "resize"]
TINY_DECODER: dict[str, Any] = {"channels": (32, 24, 16, 8), "bottleneck_dim": 32}
_OLD_FIXED_BLOCKS = re.compile(r"fixed:\[\s*\d+\s*(,\s*\d+\s*)*\]")


@dataclass(frozen=True)
class DinoUNetConfig:
    """Everything that defines a `DinoUNet`; the defaults are the paper's where it speaks.

    Args:
        variant: the encoder: ``"tiny"``, ``"small"``, ``"base"``, ``"large"``, ``"giant"``, or an `EncoderShape`, of
            DINOv2; or a name from `DINOV3_VARIANTS`, for which ``pos_mode`` has no effect.
        backbone: the configuration of a Hugging Face vision transformer that is the encoder in place of DINOv2, as
            `read_backbone` returns it; ``variant``, ``pos_mode`` and ``num_registers`` have no effect then.
        pos_mode: how the encoder's position table is resampled, see `DinoV2Encoder`.
        norm_blocks: whether the encoder's final LayerNorm is applied to every block's tokens.
        num_registers: register tokens of the encoder's checkpoint family.
        encoder_dtype: type of the encoder's weights.
        encoder_checkpoint: a folder of converted weights, or of Hugging Face's where ``backbone`` is given, to start
            from; None starts from random weights. Where the weights once came from is not saved with the network.
        num_classes: 2 or more for a softmax, 1 for a sigmoid.
        in_channels: channels of the images, 3, or 1 for grey images, which are repeated.
        size_policy: what to do with an image whose sides are no multiples of the patch: ``"error"``; ``"pad"`` it at
            the right and at the bottom by repeating its border, and crop the logits; or ``"resize"`` it to the nearest
            multiples, and the logits back.
        channels: channels of the decoder's stages, coarsest first.
        bottleneck_dim: channels of the bottleneck.
        blocks: None for a learned selection, ``"last4"``, or a list of block indices such as ``(7, 5, 3, 1)``, stage by
            stage, coarsest first. Fixed blocks have no weights: ``bottleneck`` is then ``"last"``, the skips are not
            scaled, and ``order`` and ``freeze_selection_epoch`` have no effect.
        index_base: the index of the first block in a fixed list, 0 or 1.
        top_k: number of selected blocks; one for each stage.
        order: learned blocks go to the stages by ``"depth"``, deepest to the coarsest, or by ``"weight"``.
        freeze_selection_epoch: the number of epochs after which the selection no longer changes; None lets it change.
        bottleneck: what the decoder starts from: ``"last+fused"``, ``"last"`` or ``"fused"``.
        skip_scale: the factor of each skip: ``"renorm"``, k times its share of the selected weights, 1 on average;
            ``"raw"``, its weight; ``"none"``.
        spatial_integration: whether the image enters each stage of the decoder.
        conv_then_resize: convolve the image before it is resized to the stage, instead of after.
        convs_per_stage: convolutions after each concatenation.
        norm: the decoder's normalisation: ``"batch"``, ``"instance"`` or ``"group"``.
        final_resize: what is resized to the image's size, the ``"logits"`` or the ``"features"`` before the head.
        stream_fusion: fuse the blocks while the encoder runs, instead of keeping the maps of all of them.
        stream_gradient: what the gradient of the block weights is made from when streaming: ``"project"``, the
            projection of every map, kept in its place (``bottleneck_dim`` instead of D wide); ``"recompute"``, the maps
            themselves, for which backward runs the encoder once more and nothing is kept.
        init_seed: seed of all random weights.

    Raises:
        ValueError: a value that is not allowed, or options that contradict each other.
    """

    RENAMED: ClassVar[dict[str, str]] = {"block_selection": "blocks"}

    variant: str | EncoderShape = "giant"
    backbone: dict[str, Any] | None = None
    pos_mode: PositionMode = "offset"
    norm_blocks: bool = True
    num_registers: int = 0
    encoder_dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    encoder_checkpoint: str | None = field(default=None, metadata={"saved": False})
    num_classes: int = 2
    in_channels: Literal[1, 3] = 3
    size_policy: SizePolicy = "error"
    channels: tuple[int, ...] = (256, 128, 64, 32)
    bottleneck_dim: int = 256
    blocks: tuple[int, ...] | Literal["last4"] | None = None
    index_base: int = 0
    top_k: int = 4
    order: Order = "depth"
    freeze_selection_epoch: int | None = None
    bottleneck: Bottleneck = "last+fused"
    skip_scale: SkipScale = "renorm"
    spatial_integration: bool = True
    conv_then_resize: bool = False
    convs_per_stage: int = 1
    norm: Norm = "batch"
    final_resize: FinalResize = "logits"
    stream_fusion: bool = False
    stream_gradient: StreamGradient = "project"
    init_seed: int = 0

    def __post_init__(self) -> None:
        if self.blocks is not None and not isinstance(self.blocks, str):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        if not isinstance(self.variant, EncoderShape):
            check_choice("variant", self.variant, (*VARIANTS, *DINOV3_VARIANTS))
        check_choices(self)
        for name in ("num_classes", "bottleneck_dim", "convs_per_stage", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels must be one positive number for each stage, got {self.channels}")
        if self.num_registers < 0:
            raise ValueError(f"num_registers must be at least 0, got {self.num_registers}")
        if self.freeze_selection_epoch is not None and self.freeze_selection_epoch < 0:
            raise ValueError(f"freeze_selection_epoch must be at least 0, got {self.freeze_selection_epoch}")
        if self.top_k > self.depth:
            raise ValueError(f"top_k is {self.top_k}, but the encoder has only {self.depth} blocks")
        if self.top_k != len(self.channels):
            raise ValueError(
                f"top_k is {self.top_k}, but channels {self.channels} make {len(self.channels)} stages; "
                "each stage takes one selected block"
            )
        fixed = fixed_blocks(self.blocks, self.depth, self.index_base)
        if fixed is not None and len(fixed) != self.top_k:
            raise ValueError(f"blocks {described(self.blocks)} names {len(fixed)} blocks for {self.top_k} stages")
        if fixed is None and self.bottleneck == "last" and self.skip_scale == "none":
            raise ValueError(
                "bottleneck='last' with skip_scale='none' would leave the learned block weights without any gradient; "
                "choose another of the two, or fixed blocks (blocks='last4')"
            )

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """Translate values that older versions wrote as text: ``"learned"``, ``"fixed:[7,5,3,1]"``, and ``"rerun"``.

        They knew no encoder but DINOv2.
        """
        values = {"backbone": None, **values}
        blocks = values.get("blocks")
        if blocks == "learned":
            values = {**values, "blocks": None}
        elif isinstance(blocks, str) and _OLD_FIXED_BLOCKS.fullmatch(blocks):
            values = {**values, "blocks": [int(index) for index in re.findall(r"\d+", blocks)]}
        if values.get("stream_gradient") == "rerun":
            values = {**values, "stream_gradient": "recompute"}
        return values

    @property
    def depth(self) -> int:
        """The number of blocks N of the encoder."""
        if self.backbone is not None:
            return depth_of(self.backbone)
        if isinstance(self.variant, EncoderShape):
            return self.variant.depth
        return (VARIANTS | DINOV3_VARIANTS)[self.variant].depth

    @property
    def learned(self) -> bool:
        """Whether the blocks are weighed and selected by learned logits."""
        return self.blocks is None

    @property
    def effective_bottleneck(self) -> str:
        """``bottleneck``, or ``"last"`` where the blocks are fixed."""
        return self.bottleneck if self.learned else "last"

    @property
    def effective_skip_scale(self) -> str:
        """``skip_scale``, or ``"none"`` where the blocks are fixed."""
        return self.skip_scale if self.learned else "none"


class DinoUNet(Pretrained, nn.Module):
    """Segment images (B, C, H, W) into logits (B, K, H, W) with a frozen encoder and a trained decoder.

    Attributes:
        encoder: the frozen `DinoV2Encoder`, or another `FrozenEncoder`.
        fusion: the `WeightedBlockFusion` that weighs and selects the blocks; with fixed blocks it only selects.
        decoder: the `DinoUNetDecoder`.
    """

    architecture: ClassVar[str] = "dino_unet"
    config_type: ClassVar[type] = DinoUNetConfig

    def __init__(self, config: DinoUNetConfig) -> None:
        super().__init__()
        self.config = config
        generator = weights_generator(config.init_seed)
        self.encoder = _make_encoder(config, generator)
        self.fusion = WeightedBlockFusion(
            self.encoder.depth,
            top_k=config.top_k,
            blocks=config.blocks,
            order=config.order,
            index_base=config.index_base,
        )
        self.decoder = DinoUNetDecoder(
            self.encoder.embed_dim,
            channels=config.channels,
            bottleneck_dim=config.bottleneck_dim,
            num_classes=config.num_classes,
            bottleneck=config.effective_bottleneck,
            spatial_integration=config.spatial_integration,
            conv_then_resize=config.conv_then_resize,
            convs_per_stage=config.convs_per_stage,
            norm=config.norm,
            final_resize=config.final_resize,
        )
        self.fusion.reset_parameters(generator)
        self.decoder.reset_parameters(generator)

    def forward(self, image: Tensor) -> Tensor:
        """Segment normalised images of shape (B, C, H, W): logits of shape (B, K, H, W).

        Raises:
            ShapeError: not a batch of images, not the declared channels, or sides that ``size_policy`` refuses.
        """
        x = self.prepare(image)
        if self.config.stream_fusion and self._streams():
            logits = self._forward_streaming(x)
        else:
            encoded = self.encoder(x, self.required_blocks())
            logits = self.forward_features(encoded["features"], encoded["grid"], x)
        return self._at_size_of(image, logits)

    def forward_features(self, features: Sequence[Tensor], grid: tuple[int, int], image: Tensor) -> Tensor:
        """Segment images whose features are already there, as from a cache.

        Args:
            features: tokens (B, M, D) of `required_blocks`, in that order.
            grid: (h, w) with h * w = M.
            image: the images that the features were made from, (B, 3, H, W), as `prepare` returns them.

        Returns:
            Logits (B, K, H, W).

        Raises:
            ShapeError: not as many maps as `required_blocks`, or maps of another grid.
        """
        blocks = self.required_blocks()
        if len(features) != len(blocks):
            raise ShapeError(f"DinoUNet: expected the features of blocks {blocks}, got {len(features)} maps")
        picked, fused = self.fusion.selected_maps(), None
        if self.decoder.proj_fused is not None:
            fused = self.fusion(features, picked)
            fused = self.decoder.proj_fused(fused.to(dtype_of(self.decoder.proj_fused)))
        else:
            list(picked.collect_from(zip(blocks, features, strict=True)))
        return self._decode(features[-1], picked, fused, grid, image)

    def required_blocks(self) -> tuple[int, ...]:
        """Return the blocks whose features the network may ever use, ascending: all where they are learned."""
        if self.config.learned:
            return tuple(range(self.encoder.depth))
        return tuple(sorted({*self.fusion.selected, self.encoder.depth - 1}))

    def start_epoch(self, epoch: int) -> None:
        """Freeze the selection if its epoch is reached; called when an epoch, counted from 0, begins or resumes."""
        freeze_epoch = self.config.freeze_selection_epoch
        if self.config.learned and freeze_epoch is not None and epoch >= freeze_epoch:
            self.fusion.freeze_selection()  # once frozen, it stays what it is

    def prepare(self, image: Tensor) -> Tensor:
        """Bring images (B, C, H, W) to the three channels and the size that the encoder takes."""
        check_image("DinoUNet", image, self.config.in_channels)
        if self.config.in_channels == 1:
            image = image.expand(-1, 3, -1, -1)
        height, width = image.shape[-2:]
        patch = self.encoder.patch_size
        if self.config.size_policy == "pad":
            return F.pad(image, (0, -width % patch, 0, -height % patch), mode="replicate")
        if self.config.size_policy == "resize":
            return resize_bilinear(image, (_nearest_multiple(height, patch), _nearest_multiple(width, patch)))
        return image  # the encoder refuses a size that does not fit

    def _at_size_of(self, image: Tensor, logits: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if self.config.size_policy == "resize":
            return resize_bilinear(logits, (height, width))
        return logits[..., :height, :width]  # padded at the right and at the bottom

    def _streams(self) -> bool:
        """Streaming calls neither encoder nor fusion, and projects by a weight alone: hooks would see nothing."""
        called = as_its_class_says(self.encoder) and as_its_class_says(self.fusion)
        return called and (self.decoder.proj_fused is None or is_plain(self.decoder.proj_fused))

    def _forward_streaming(self, x: Tensor) -> Tensor:
        picked = self.fusion.selected_maps()
        last = self.encoder.depth - 1
        weight = None if self.decoder.proj_fused is None else self.decoder.proj_fused.weight
        blocks = "all" if weight is not None or picked.known is None else sorted({*picked.known, last})

        def visit(receive: Receive) -> None:
            self.encoder.visit(x, blocks, receive)

        fusing = self.fusion.streamed({last}, weight, visit if self.config.stream_gradient == "recompute" else None)

        def receive(index: int, tokens: Tensor) -> None:
            picked.collect(index, tokens)
            fusing.add(index, tokens)

        visit(receive)
        kept, fused = fusing.result()
        return self._decode(kept[last], picked, fused, self.encoder.grid_of(x), x)

    def _decode(
        self, last: Tensor, picked: SelectedMaps, fused: Tensor | None, grid: tuple[int, int], image: Tensor
    ) -> Tensor:
        return self.decoder(last, fused, picked.collected(), self._skip_scales(picked.indices), grid, image)

    def _skip_scales(self, selected: Tensor) -> Tensor | None:
        """The factor of each stage's skip, shape (k,), through which the logits are trained; None for 1."""
        if self.config.effective_skip_scale == "none":
            return None
        scales = self.fusion.weights.index_select(0, selected)
        return scales if self.config.skip_scale == "raw" else len(selected) * scales / scales.sum()


def dino_unet_tiny(**overrides: Any) -> DinoUNet:
    """Build the network for tests and demonstrations: 4 blocks of width 64, a narrow decoder."""
    return DinoUNet(DinoUNetConfig(**{"variant": "tiny", **TINY_DECODER, **overrides}))


def dino_unet_small(**overrides: Any) -> DinoUNet:
    """Build the network on DINOv2 ViT-S/14, smaller than the paper's; ``overrides`` are `DinoUNetConfig` fields."""
    return DinoUNet(DinoUNetConfig(**{"variant": "small", **overrides}))


def dino_unet_base(**overrides: Any) -> DinoUNet:
    """Build the paper's network on DINOv2 ViT-B/14; ``overrides`` are fields of `DinoUNetConfig`."""
    return DinoUNet(DinoUNetConfig(**{"variant": "base", **overrides}))


def dino_unet_large(**overrides: Any) -> DinoUNet:
    """Build the paper's network on DINOv2 ViT-L/14; ``overrides`` are fields of `DinoUNetConfig`."""
    return DinoUNet(DinoUNetConfig(**{"variant": "large", **overrides}))


def dino_unet_giant(**overrides: Any) -> DinoUNet:
    """Build the paper's network on DINOv2 ViT-g/14; ``overrides`` are fields of `DinoUNetConfig`."""
    return DinoUNet(DinoUNetConfig(**{"variant": "giant", **overrides}))


def dino_unet_on(folder: str | os.PathLike[str], **overrides: Any) -> DinoUNet:
    """Build the network on the encoder in a folder; ``overrides`` are fields of `DinoUNetConfig`.

    Args:
        folder: of a Hugging Face vision transformer, or of weights that ``trifuse convert`` wrote.

    Raises:
        CheckpointError: neither of the two is there, or it is damaged.
        ShapeError: the maps of its blocks differ in width or grid.
        MissingExtra: it is Hugging Face's, and transformers is not installed.
    """
    fields = describe_encoder(folder)
    return DinoUNet(DinoUNetConfig(**{**fields, "encoder_checkpoint": str(folder), **overrides}))


def _make_encoder(config: DinoUNetConfig, generator: torch.Generator) -> FrozenEncoder:
    dtype = getattr(torch, config.encoder_dtype)
    if config.backbone is not None:
        return BackboneEncoder(
            config.backbone, config.norm_blocks, config.encoder_checkpoint, dtype, generator=generator
        )
    options: dict[str, Any] = {"num_registers": config.num_registers, "generator": generator}
    if config.variant in DINOV3_VARIANTS:
        return DinoV3Encoder(config.variant, config.norm_blocks, config.encoder_checkpoint, dtype, **options)
    return DinoV2Encoder(
        config.variant, config.pos_mode, config.norm_blocks, config.encoder_checkpoint, dtype, **options
    )


def _nearest_multiple(side: int, patch: int) -> int:
    return max(1, round(side / patch)) * patch
