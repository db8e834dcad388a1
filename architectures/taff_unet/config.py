"""What defines a TAFF-UNet: its inputs, its sizes, and how an ECG joins its image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from trifuse.blocks.plain_unet import planned_features, planned_stages
from trifuse.blocks.temporal_aware_fusion import BY_SEGMENT, GateTime, Projection
from trifuse.kernels.choices import check_choice, check_choices

from .ecg_autoencoder import EcgAutoencoderConfig
from .variants import ECG, PRIOR, SETTINGS, TIME

GRID_SIDE = 8  # of the coarse map that an ECG is projected to, unless it is given

_AT_LEAST_ONE = ("base_dim", "max_dim", "gate_width", "film_width")

Skip = Literal["fused", "original"]
Gate = Literal["before_norm", "after_norm"]
SegmentMasks = Literal["labels", "soft"]


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
        gate_time: how the gate sees the distance in time: in a network of its own (``"apart"``), as one more number
            beside the others (``"joined"``), or not at all (``"unseen"``). None is ``"apart"`` for settings with time.
        gate: what the fusion's gate sees: ``"before_norm"``, the means of the image's features from before their norm
            and the normalised code, through a leaky rectifier; or ``"after_norm"``, as in the first version, the means
            of the normalised features, which hardly differ between cases, and the code, through a ReLU.
        gate_width: hidden units of that gate, and
        film_width: of the network that turns the days into a modulation.
        projection: how the ECG becomes a map, see `TemporalAwareFusion`: per segment of the prior (``"segments"``,
            ``"segments_full"``), on a coarse ``"grid"``, or one value per channel (``"broadcast"``). None takes
            ``"segments"`` for settings with a prior, and ``"broadcast"``, rectified, for those without.
        rectify: apply a leaky rectifier behind the fusion; None does so where ``projection`` is None and there is no
            prior: without one, a broadcast is hardly heard behind the next norm.
        segment_masks: one segment for each position of the fused map (``"labels"``), or the ``"soft"`` share of each.
        grid_side: side of the grid; None is 8.
        grid_follows_image: mirror and turn the grid with the image, which then needs ``transform`` beside it.
        ecg: the ECG autoencoder.
        ecg_checkpoint: a folder of `EcgAutoencoder.save_pretrained` to start from; None starts from random weights.
            Where the weights once came from is not saved with the network.
        init_seed: seed of all random weights but the autoencoder's, which has its own.

    Raises:
        ValueError: a value that is not allowed, or options that contradict each other.
    """

    RENAMED: ClassVar[dict[str, str]] = {"spatial_mlp": "grid_side", "gate_sees_time": "gate_time"}

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
    gate_time: GateTime | None = None
    gate: Gate = "before_norm"
    gate_width: int = 64
    film_width: int = 64
    projection: Projection | None = None
    rectify: bool | None = None
    segment_masks: SegmentMasks = "labels"
    grid_side: int | None = None
    grid_follows_image: bool = True
    ecg: EcgAutoencoderConfig = field(default_factory=EcgAutoencoderConfig)
    ecg_checkpoint: str | None = field(default=None, metadata={"saved": False})
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_choice("setting", self.setting, SETTINGS)
        check_choices(self)
        for name, least in {"num_classes": 2, "image_size": 8, **dict.fromkeys(_AT_LEAST_ONE, 1)}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.max_days < math.inf:
            raise ValueError(f"max_days must be positive and finite, got {self.max_days}")
        if self.gate_time not in (None, "unseen") and not self.takes_time:
            raise ValueError(
                f"gate_time={self.gate_time!r} needs a setting with time, such as 'full', got {self.setting!r}"
            )
        if self.ecg_checkpoint is not None and not self.takes_ecg:
            raise ValueError(f"ecg_checkpoint needs a setting with an ECG, such as 'full', got {self.setting!r}")
        self._check_projection()
        self._check_stages()

    def _check_projection(self) -> None:
        if self.grid_side is not None and self.grid_side < 1:
            raise ValueError(f"grid_side must be at least 1, or None, got {self.grid_side}")
        if self.grid_side is not None and self.fusion_projection != "grid":
            raise ValueError(
                f"grid_side is for projection='grid', got {self.grid_side} with {self.fusion_projection!r}; leave it "
                "out, or choose projection='grid'"
            )
        if self.takes_ecg and not self.takes_prior and self.fusion_projection in BY_SEGMENT:
            raise ValueError(
                f"projection={self.projection!r} needs a setting with a prior, such as 'full', got {self.setting!r}; "
                "without one use 'grid' or 'broadcast'"
            )

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

    @property
    def fusion_projection(self) -> Projection:
        """How an ECG becomes a map, chosen or not."""
        if self.projection is not None:
            return self.projection
        return "segments" if self.takes_prior else "broadcast"

    @property
    def takes_segments(self) -> bool:
        """Whether the ECG's map follows the segments of the prior."""
        return self.takes_ecg and self.fusion_projection in BY_SEGMENT

    @property
    def fusion_gate_time(self) -> GateTime:
        """How the gate sees the distance in time, chosen or not."""
        return self.gate_time or ("apart" if self.takes_time else "unseen")

    @property
    def takes_transform(self) -> bool:
        """Whether the network has to be told how an image was mirrored and turned."""
        return self.takes_ecg and self.fusion_projection == "grid" and self.grid_follows_image

    @property
    def rectifies(self) -> bool:
        """Whether a rectifier stands behind the fusion, chosen or not."""
        return self.rectify if self.rectify is not None else self.projection is None and not self.takes_prior

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: one width; one value per channel, or a grid that stayed where it was."""
        values = {"gate_width": 64, "film_width": 64, **values}
        if isinstance(joined := values.get("gate_time"), bool):
            values = {**values, "gate_time": "joined" if joined else "unseen"}
        if "projection" in values:
            return values
        is_grid = values.get("grid_side") is not None
        form = {"projection": "grid" if is_grid else "broadcast", "rectify": None, "segment_masks": "labels"}
        return {"gate": "after_norm", **form, "grid_follows_image": not is_grid, **values}
