"""TAFF-UNet: nnU-Net's plain U-Net, given the AHA-17 atlas beside its image, and an ECG half-way down its encoder.

Source: the paper on temporal-aware feature fusion (TAFF) of ECG and late gadolinium enhancement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trifuse.architectures.storage.pretrained import Pretrained, weights_generator
from trifuse.architectures.storage.segment_maps import AHA_SEGMENTS
from trifuse.blocks.ecg_attention import EcgAttention
from trifuse.blocks.image_input import check_image
from trifuse.blocks.plain_unet import PlainUNetDecoder, PlainUNetEncoder, check_sides, planned_features, planned_stages
from trifuse.blocks.temporal_aware_fusion import TemporalAwareFusion
from trifuse.kernels import CheckpointError, ShapeError
from trifuse.kernels.choices import check_choice, check_choices
from trifuse.kernels.library import values_at_hand

from .ecg_autoencoder import NUM_LEADS, EcgAutoencoder, EcgAutoencoderConfig
from .variants import ECG, PRIOR, SETTINGS, TIME

Skip = Literal["fused", "original"]


@dataclass(frozen=True)
class TaffUNetConfig:
    """Everything that defines a `TaffUNet`; the defaults are the paper's where it speaks.

    Args:
        setting: what the network is given beside the image: nothing (``"baseline"``), the AHA-17 prior (``"ap"``), an
            ECG (``"ecg"``), an ECG and its distance in time (``"ecg_time"``, which is not in the paper), prior and ECG
            (``"ecg_ap"``), or all three (``"full"``).
        num_classes: at least 2, the background included.
        image_size: side in pixels of the images it is meant for, which decides how often they are halved.
        base_dim: channels of the first stage; each further stage has twice as many,
        max_dim: but never more than this.
        fusion_stage: the encoder's stage, counted from 0, behind which the ECG joins.
        skip: what of that stage goes to the decoder: the ``"fused"`` map, or the ``"original"`` one.
        detach_z: keep the gradient of the segmentation out of the ECG's encoder.
        max_days: the distance in time that counts as 1, and beyond which nothing changes.
        zero_init_proj: let the ECG's share of the fused map start at zero.
        gate_sees_time: give the gate the distance in time, too.
        spatial_mlp: side of a coarse grid that the ECG is projected to; None spreads one value per channel evenly.
        ecg: the ECG autoencoder.
        ecg_checkpoint: a folder of `EcgAutoencoder.save_pretrained` to start from; None starts from random weights.
            Where the weights once came from is not saved with the network.
        init_seed: seed of all random weights but the autoencoder's, which has its own.

    Raises:
        ValueError: a value that is not allowed, or options that contradict each other.
    """

    setting: str = "full"
    num_classes: int = 4
    image_size: int = 256
    base_dim: int = 32
    max_dim: int = 512
    fusion_stage: int = 3
    skip: Skip = "fused"
    detach_z: bool = False
    max_days: float = 90.0
    zero_init_proj: bool = False
    gate_sees_time: bool = False
    spatial_mlp: int | None = None
    ecg: EcgAutoencoderConfig = field(default_factory=EcgAutoencoderConfig)
    ecg_checkpoint: str | None = field(default=None, metadata={"saved": False})
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_choice("setting", self.setting, SETTINGS)
        check_choices(self)
        for name, least in (("num_classes", 2), ("image_size", 8), ("base_dim", 1), ("max_dim", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.max_days > 0:
            raise ValueError(f"max_days must be positive, got {self.max_days}")
        if self.spatial_mlp is not None and self.spatial_mlp < 1:
            raise ValueError(f"spatial_mlp must be at least 1, or None, got {self.spatial_mlp}")
        if self.gate_sees_time and not self.takes_time:
            raise ValueError(f"gate_sees_time needs a setting with time, such as 'full', got {self.setting!r}")
        if self.ecg_checkpoint is not None and not self.takes_ecg:
            raise ValueError(f"ecg_checkpoint needs a setting with an ECG, such as 'full', got {self.setting!r}")
        self._check_stages()

    def _check_stages(self) -> None:
        step = 2 ** (len(self.features) - 1)
        if self.image_size % step:
            fitting = -(-self.image_size // step) * step
            raise ValueError(
                f"image_size must be a multiple of {step} to be halved {len(self.features) - 1} times, got "
                f"{self.image_size}; use {fitting}"
            )
        if not self.takes_ecg:
            return
        last = len(self.features) - 1
        if not 0 <= self.fusion_stage <= last:
            raise ValueError(
                f"fusion_stage must be one of 0 to {last}, the stages for images of {self.image_size} pixels, got "
                f"{self.fusion_stage}"
            )
        if self.skip == "original" and self.fusion_stage == last:
            raise ValueError(
                f"skip='original' at the last stage, {last}, would leave the fused map unused; use an earlier "
                "fusion_stage, or skip='fused'"
            )

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of the stages, finest first."""
        return planned_features(planned_stages(self.image_size), self.base_dim, self.max_dim)

    @property
    def takes_prior(self) -> bool:
        """Whether the network is given the AHA-17 prior."""
        return PRIOR in SETTINGS[self.setting]

    @property
    def takes_ecg(self) -> bool:
        """Whether the network is given an ECG."""
        return ECG in SETTINGS[self.setting]

    @property
    def takes_time(self) -> bool:
        """Whether the network is given the days between ECG and image."""
        return TIME in SETTINGS[self.setting]


class TaffOutput(NamedTuple):
    """What a pass of `TaffUNet.run` gives.

    Attributes:
        logits: (B, K, H / 2**i, W / 2**i), full resolution first; in evaluation that one alone.
        gate: weights (B, 2) of image and ECG, (0, 0) for samples without an ECG; None for settings without one.
        reconstruction: ECGs (B, 12, T) as the autoencoder sees them, zeros for samples without one; None likewise.
    """

    logits: list[Tensor]
    gate: Tensor | None
    reconstruction: Tensor | None


class _Ecg(NamedTuple):
    """The ECGs of a batch: codes (B, E), which samples have one (B,) or None for all, and days (B,)."""

    code: Tensor
    present: Tensor | None
    interval: Tensor | float | None


class TaffUNet(Pretrained, nn.Module):
    """Segment images (B, 1, H, W) into logits (B, K, H, W), or, while training, into logits at every resolution.

    Attributes:
        encoder, decoder: those of the plain U-Net.
        ecg: the `EcgAutoencoder`; None for settings without an ECG.
        fusion: the `TemporalAwareFusion`; None likewise.

    Source: the paper's Fig. 1.
    """

    architecture: ClassVar[str] = "taff_unet"
    config_type: ClassVar[type] = TaffUNetConfig

    def __init__(self, config: TaffUNetConfig) -> None:
        super().__init__()
        self.config = config
        features = config.features
        self.encoder = PlainUNetEncoder(1 + AHA_SEGMENTS * config.takes_prior, features)
        self.decoder = PlainUNetDecoder(features, config.num_classes)
        self.ecg = _autoencoder(config) if config.takes_ecg else None
        self.fusion = _fusion(config) if config.takes_ecg else None
        generator = weights_generator(config.init_seed)
        for part in (self.encoder, self.decoder, self.fusion):
            if part is not None:
                part.reset_parameters(generator)

    def forward(
        self,
        image: Tensor,
        prior: Tensor | None = None,
        ecg: Tensor | None = None,
        interval: Tensor | float | None = None,
        has_ecg: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Segment images of shape (B, 1, H, W), whose sides all stages can halve.

        Args:
            image: late gadolinium enhancement, normalised.
            prior: one-hot AHA segments (B, 17, H, W), of any type; for settings with a prior, and only for those.
            ecg: median beats (B, 12, T), z-scored; for settings with an ECG, and only for those. None means that no
                sample has one.
            interval: days between ECG and image, a number, (B,) or (B, 1); settings without time leave it alone.
            has_ecg: which samples have an ECG, bool of shape (B,); None means all. One without comes out exactly as
                from a network without an ECG, whatever stands in its row. In training a batch without any leaves the
                autoencoder without a gradient, or on a GPU, which is not waited for, with one of zero.

        Returns:
            In evaluation logits (B, K, H, W); in training a list of logits (B, K, H / 2**i, W / 2**i), full resolution
            first.

        Raises:
            ShapeError: a shape that is not as above.
            ValueError: the setting needs what is not there, or takes nothing of the kind.
        """
        self._check(image, prior, ecg, interval, has_ecg)
        logits, _ = self._segment(image, prior, self._encode(ecg, interval, has_ecg))
        return logits if self.training else logits[0]

    def run(
        self,
        image: Tensor,
        prior: Tensor | None = None,
        ecg: Tensor | None = None,
        interval: Tensor | float | None = None,
        has_ecg: Tensor | None = None,
    ) -> TaffOutput:
        """Return all that training needs: logits, gate weights and reconstructed ECGs; the arguments are `forward`'s.

        Raises:
            ShapeError, ValueError: see `forward`.
        """
        self._check(image, prior, ecg, interval, has_ecg)
        beat = self._encode(ecg, interval, has_ecg)
        logits, gate = self._segment(image, prior, beat)
        return TaffOutput(logits, gate, self._decode(beat))

    def attention(self, ecg: Tensor) -> EcgAttention:
        """Return the attention weights of median beats (B, 12, T); see `EcgAutoencoder.attention`.

        Raises:
            ValueError: the setting has no ECG.
        """
        if self.ecg is None:
            raise ValueError(f"TaffUNet: setting {self.config.setting!r} has no ECG to attend to")
        return self.ecg.attention(ecg)

    def _segment(self, image: Tensor, prior: Tensor | None, beat: _Ecg | None) -> tuple[list[Tensor], Tensor | None]:
        """Return the logits, full resolution first, and the weights of the gate."""
        x = image if prior is None else torch.cat([image, prior.to(image.dtype)], dim=1)
        gate = None if self.fusion is None else image.new_zeros(image.shape[0], 2, dtype=torch.float32)
        maps = []
        for index, stage in enumerate(self.encoder.stages):
            skip = x = stage(x)
            if index == self.config.fusion_stage and self.fusion is not None and beat is not None:
                code = beat.code.detach() if self.config.detach_z else beat.code
                x, gate = self.fusion(x, code, beat.interval, beat.present)
            maps.append(skip if self.config.skip == "original" else x)
        return self.decoder(maps, all_heads=self.training), gate

    def _encode(self, ecg: Tensor | None, interval: Tensor | float | None, has_ecg: Tensor | None) -> _Ecg | None:
        """Return the codes of the ECGs that are there, zeros for the others; None where the network takes none."""
        if self.ecg is None or ecg is None:
            return None
        if not self.config.takes_time:
            interval = None
        elif interval is None:
            interval = 0.0  # nobody has an ECG, as `_check` has seen
        if has_ecg is None:
            return _Ecg(self.ecg.encode(ecg), None, interval)
        present = has_ecg.reshape(-1).bool()
        code = _of_present(self.ecg.encode, ecg, present, (self.ecg.config.z_dim,), gather=self._gathers(present))
        return _Ecg(code, present, interval)

    def _decode(self, beat: _Ecg | None) -> Tensor | None:
        if self.ecg is None or beat is None:
            return None
        if beat.present is None:
            return self.ecg.decode(beat.code)
        shape = (NUM_LEADS, self.ecg.config.time_steps)
        return _of_present(self.ecg.decode, beat.code, beat.present, shape, gather=self._gathers(beat.present))

    def _gathers(self, present: Tensor) -> bool:
        """Whether the autoencoder is given the ECGs that are there alone: less work, where their number is known."""
        return self.training and values_at_hand((present,))

    # ------------------------------------------------------------------------------------------------ what it takes

    def _check(
        self,
        image: Tensor,
        prior: Tensor | None,
        ecg: Tensor | None,
        interval: Tensor | float | None,
        has_ecg: Tensor | None,
    ) -> None:
        check_image("TaffUNet", image, 1)
        check_sides("TaffUNet", image, len(self.config.features))
        self._check_prior(image, prior)
        if ecg is not None and self.ecg is None:
            raise ValueError(f"TaffUNet: setting {self.config.setting!r} takes no ecg; leave it out, or use 'ecg'")
        if self.ecg is None:
            return
        for name, value in (("ecg", ecg), ("has_ecg", has_ecg)):
            if value is not None and (value.ndim == 0 or value.shape[0] != image.shape[0]):
                raise ShapeError(f"TaffUNet: expected {name} of {image.shape[0]} samples, got {tuple(value.shape)}")
        number = int(has_ecg.sum()) if has_ecg is not None and values_at_hand((has_ecg,)) else None
        if ecg is None and number:
            raise ValueError("TaffUNet: has_ecg names samples with an ECG, but there is no ecg; pass it")
        if self.config.takes_time and interval is None and ecg is not None and number != 0:
            raise ValueError(
                f"TaffUNet: setting {self.config.setting!r} needs interval, the days between ECG and image, (B,)"
            )

    def _check_prior(self, image: Tensor, prior: Tensor | None) -> None:
        setting = self.config.setting
        if prior is None:
            if self.config.takes_prior:
                raise ValueError(
                    f"TaffUNet: setting {setting!r} needs prior, one-hot AHA segments of shape "
                    f"(B, {AHA_SEGMENTS}, H, W); aha17_map makes them"
                )
            return
        if not self.config.takes_prior:
            raise ValueError(f"TaffUNet: setting {setting!r} takes no prior; leave it out, or use 'ap' or 'full'")
        wanted = (image.shape[0], AHA_SEGMENTS, *image.shape[2:])
        if prior.shape != wanted:
            raise ShapeError(f"TaffUNet: expected a prior of shape {wanted}, got {tuple(prior.shape)}")


def taff_unet(setting: str = "full", num_classes: int = 4, **options: Any) -> TaffUNet:
    """Build the paper's network in one of its settings; ``options`` are fields of `TaffUNetConfig`."""
    return TaffUNet(TaffUNetConfig(setting, num_classes, **options))


def _of_present(
    work: Callable[..., Tensor], x: Tensor, present: Tensor, shape: Sequence[int], *, gather: bool
) -> Tensor:
    """Return ``work(x)``, of ``shape`` for each sample, and zeros for samples that are not present.

    No statistics of a batch depend on the others. Gathered, ``work`` sees those that are present alone; else it sees
    zeros in their place and is told which they are, and no GPU has to say first how many there are.
    """
    if not gather:
        there = present.view(-1, *[1] * (x.ndim - 1))
        y = work(torch.where(there, x, 0.0), present)
        return torch.where(present.view(-1, *[1] * len(shape)), y, 0.0)
    rows = present.nonzero().squeeze(1)
    nothing = x.new_zeros(x.shape[0], *shape)
    return nothing.index_copy(0, rows, work(x[rows]).to(nothing.dtype)) if len(rows) else nothing


def _autoencoder(config: TaffUNetConfig) -> EcgAutoencoder:
    if config.ecg_checkpoint is None:
        return EcgAutoencoder(config.ecg)
    loaded = EcgAutoencoder.from_pretrained(config.ecg_checkpoint)
    if replace(loaded.config, init_seed=config.ecg.init_seed) != config.ecg:
        raise CheckpointError(
            f"{config.ecg_checkpoint}: wrong configuration: got {loaded.config}, want {config.ecg}; build the network "
            "with ecg=EcgAutoencoder.from_pretrained(folder).config"
        )
    return loaded.train()


def _fusion(config: TaffUNetConfig) -> TemporalAwareFusion:
    return TemporalAwareFusion(
        config.features[config.fusion_stage],
        ecg_dim=config.ecg.z_dim,
        time=config.takes_time,
        max_days=config.max_days,
        zero_init_proj=config.zero_init_proj,
        gate_sees_time=config.gate_sees_time,
        spatial_mlp=config.spatial_mlp,
    )
