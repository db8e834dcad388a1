"""TAFF-UNet: nnU-Net's plain U-Net, given the AHA-17 atlas beside its image, and an ECG half-way down its encoder.

Source: the paper on temporal-aware feature fusion (TAFF) of ECG and late gadolinium enhancement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trifuse.architectures.storage.pretrained import Pretrained, weights_generator
from trifuse.architectures.storage.segment_maps import AHA_SEGMENTS
from trifuse.blocks.ecg_attention import EcgAttention
from trifuse.blocks.image_input import check_image
from trifuse.blocks.plain_unet import NEGATIVE_SLOPE, PlainUNetDecoder, PlainUNetEncoder, check_sides
from trifuse.blocks.segment_masks import pooled_masks, segment_labels
from trifuse.blocks.temporal_aware_fusion import TemporalAwareFusion
from trifuse.kernels import CheckpointError, ShapeError
from trifuse.kernels.library import values_at_hand

from .config import GRID_SIDE, TaffUNetConfig
from .ecg_autoencoder import NUM_LEADS, EcgAutoencoder


class TaffOutput(NamedTuple):
    """What a pass of `TaffUNet.run` gives.

    Attributes:
        logits: (B, K, H / 2^i, W / 2^i), full resolution first; in evaluation that one alone.
        gate: weights (B, 2) of image and ECG, (0, 0) for samples without an ECG; None for settings without one.
        reconstruction: ECGs (B, 12, T) as the autoencoder sees them, zeros for samples without one; None likewise.
        segment_scores: what each ECG says of the heart's segments, (B, 17), zeros for samples without one; None unless
            the ECG's map is of rank one over the segments, ``projection="segments"``, and where nobody has an ECG. See
            `TemporalAwareFusion.segment_scores`.
    """

    logits: list[Tensor]
    gate: Tensor | None
    reconstruction: Tensor | None
    segment_scores: Tensor | None = None


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
        transform: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Segment images of shape (B, 1, H, W), whose sides all stages can halve.

        Args:
            image: late gadolinium enhancement, normalised.
            prior: one-hot AHA segments (B, 17, H, W), of any type, 0 and 1 or shares between them; for settings with a
                prior, and only for those.
            ecg: median beats (B, 12, T), of any floating-point type, scaled as the autoencoder's configuration says;
                for settings with an ECG, and only for those. None means that no sample has one.
            interval: days between ECG and image, a number, (B,) or (B, 1); settings without time leave it alone.
            has_ecg: which samples have an ECG, bool of shape (B,); None means all. One without comes out exactly as
                from a network without an ECG, whatever stands in its row. In training a batch without any leaves the
                autoencoder without a gradient, or on a GPU, which is not waited for, with one of zero.
            transform: how each image was mirrored and turned, (B, 2, 3): where its positions lay before, as
                `torch.nn.functional.affine_grid` takes it, ``[[1, 0, 0], [0, 1, 0]]`` where it was not. For
                ``projection="grid"`` alone; others leave it alone.

        Returns:
            In evaluation logits (B, K, H, W); in training a list of logits (B, K, H / 2^i, W / 2^i), full resolution
            first.

        Raises:
            ShapeError: a shape that is not as above.
            ValueError: the setting needs what is not there, or takes nothing of the kind; or a prior that is not
                within [0, 1], where its values are known without waiting for a GPU.
            TypeError: an ECG of whole numbers.
        """
        self._check(image, prior, ecg, interval, has_ecg, transform)
        logits, _ = self._segment(image, prior, self._encode(ecg, interval, has_ecg), transform)
        return logits if self.training else logits[0]

    def run(
        self,
        image: Tensor,
        prior: Tensor | None = None,
        ecg: Tensor | None = None,
        interval: Tensor | float | None = None,
        has_ecg: Tensor | None = None,
        transform: Tensor | None = None,
    ) -> TaffOutput:
        """Return all that training and reports need of a batch; the arguments are those of `forward`.

        Raises:
            ShapeError, ValueError: see `forward`.
        """
        self._check(image, prior, ecg, interval, has_ecg, transform)
        beat = self._encode(ecg, interval, has_ecg)
        logits, gate = self._segment(image, prior, beat, transform)
        scores = None
        if self.fusion is not None and beat is not None:
            scores = self.fusion.segment_scores(beat.code, beat.present)
        return TaffOutput(logits, gate, self._decode(beat), scores)

    def attention(self, ecg: Tensor) -> EcgAttention:
        """Return the attention weights of median beats (B, 12, T); see `EcgAutoencoder.attention`.

        Raises:
            ValueError: the setting has no ECG.
        """
        if self.ecg is None:
            raise ValueError(f"TaffUNet: setting {self.config.setting!r} has no ECG to attend to")
        return self.ecg.attention(ecg)

    def _segment(
        self, image: Tensor, prior: Tensor | None, beat: _Ecg | None, transform: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the logits, full resolution first, and the weights of the gate."""
        x = image if prior is None else torch.cat([image, prior.to(image.dtype)], dim=1)
        gate = None if self.fusion is None else image.new_zeros(image.shape[0], 2, dtype=torch.float32)
        if beat is None:
            return self.decoder(self.encoder(x), all_heads=self.training), gate
        fused = x

        def fuse(features: Tensor, means: Tensor) -> Tensor:
            nonlocal fused, gate
            fused, gate = self._fuse(features, means, prior, beat, transform)
            return fused

        maps = self.encoder(x, self.config.fusion_stage, fuse)
        if self.config.skip != "original":
            maps[self.config.fusion_stage] = fused
        return self.decoder(maps, all_heads=self.training), gate

    def _fuse(
        self, features: Tensor, means: Tensor, prior: Tensor | None, beat: _Ecg, transform: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what the ECG makes of the map of the stage of fusion, and the weights of the gate."""
        assert self.fusion is not None  # there is a beat
        size = (features.shape[2], features.shape[3])
        segments = None
        if self.config.takes_segments and prior is not None:
            segments = (
                segment_labels(prior, size) if self.config.segment_masks == "labels" else pooled_masks(prior, size)
            )
        return self.fusion(
            features,
            beat.code.detach() if self.config.detach_z else beat.code,
            beat.interval,
            beat.present,
            segments,
            image_means=means if self.config.gate == "before_norm" else None,
            transform=transform if self.config.takes_transform else None,
        )

    def _encode(self, ecg: Tensor | None, interval: Tensor | float | None, has_ecg: Tensor | None) -> _Ecg | None:
        """Return the codes of the ECGs that are there, zeros for the others; None where the network takes none."""
        if self.ecg is None or ecg is None:
            return None
        ecg = self.ecg.taken(ecg)
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
        transform: Tensor | None,
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
        if has_ecg is not None and has_ecg.numel() != image.shape[0]:
            got = tuple(has_ecg.shape)
            raise ShapeError(f"TaffUNet: expected has_ecg of shape ({image.shape[0]},), one for each sample, got {got}")
        number = int(has_ecg.sum()) if has_ecg is not None and values_at_hand((has_ecg,)) else None
        if ecg is None and number:
            raise ValueError("TaffUNet: has_ecg names samples with an ECG, but there is no ecg; pass it")
        if self.config.takes_time and interval is None and ecg is not None and number != 0:
            raise ValueError(
                f"TaffUNet: setting {self.config.setting!r} needs interval, the days between ECG and image, (B,)"
            )
        if self.config.takes_transform and transform is None and ecg is not None and number != 0:
            raise ValueError(
                "TaffUNet: projection='grid' needs transform, how each image was mirrored and turned, (B, 2, 3); "
                "[[1, 0, 0], [0, 1, 0]] says that it was not"
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
        if values_at_hand((prior,)) and prior.numel():
            low, high = float(prior.min()), float(prior.max())
            if not 0 <= low <= high <= 1:
                raise ValueError(
                    f"TaffUNet: expected a prior of 0 and 1, a channel for each segment, got {low:g} to {high:g}; "
                    "divide it by its largest value, or make it by aha17_map"
                )


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


def check_autoencoder(config: TaffUNetConfig) -> None:
    """Refuse a trained autoencoder that is another one than the configuration says; its weights are not read.

    Raises:
        CheckpointError: naming what differs, such as what was done with the voltage of its beats.
    """
    if config.ecg_checkpoint is None:
        return
    saved = EcgAutoencoder.saved_config(config.ecg_checkpoint)
    wanted = replace(config.ecg, init_seed=saved.init_seed)
    differing = [field.name for field in fields(saved) if getattr(saved, field.name) != getattr(wanted, field.name)]
    if differing:
        got, want = (", ".join(f"{n}={getattr(of, n)!r}" for n in differing) for of in (saved, wanted))
        values = {name: getattr(saved, name) for name in differing}
        words = (f"network.ecg.{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in values.items())
        raise CheckpointError(
            f"{config.ecg_checkpoint}: wrong configuration: got {got}, want {want}; choose another autoencoder, or "
            f"build the network for this one: --set {' --set '.join(words)}"
        )


def _autoencoder(config: TaffUNetConfig) -> EcgAutoencoder:
    if config.ecg_checkpoint is None:
        return EcgAutoencoder(config.ecg)
    check_autoencoder(config)
    return EcgAutoencoder.from_pretrained(config.ecg_checkpoint).train()


def _fusion(config: TaffUNetConfig) -> TemporalAwareFusion:
    return TemporalAwareFusion(
        config.features[config.fusion_stage],
        ecg_dim=config.ecg.z_dim,
        time=config.takes_time,
        max_days=config.max_days,
        zero_init_proj=config.zero_init_proj,
        gate_time=config.gate_time,
        projection=config.fusion_projection,
        grid_side=config.grid_side or GRID_SIDE,
        rectify=config.rectifies,
        normalise_code=config.gate == "before_norm",
        gate_slope=NEGATIVE_SLOPE if config.gate == "before_norm" else 0.0,
        num_segments=AHA_SEGMENTS,
        gate_width=config.gate_width,
        film_width=config.film_width,
    )
