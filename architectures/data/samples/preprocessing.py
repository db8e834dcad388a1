"""How volumes become the inputs of a network: one description, the same in training and in use.

See volume_to_slices.py and resampling.py for what is done by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trifuse.architectures.data.volumes.files import NonFinite

CLIP_PERCENTILES = (1.0, 99.0)
_SPACINGS_MM = (1e-3, 1e3)  # beyond them nothing is an image of a body
_LARGEST_SIZE = 65_536

Slices = Literal["all", "foreground", "labelled"]
"""Which slices count: all, those that show a target, or those on which anything is drawn, whether target or not (cine
cohorts are often contoured in part)."""


@dataclass(frozen=True)
class Patches:
    """How networks are trained on patches of slices, and predict slices window by window.

    Attributes:
        spacing_mm: rows and columns of all slices are resampled to it; None takes the median of the training cases,
            which is fixed and written down when a run is prepared.
        step: from one window of a prediction to the next, at most, in patches.
        mirror: whether a prediction is the mean over the four mirrorings of a patch.
        foreground: share of the training patches that are centred on a class, each class as often as the others.
        samples_per_epoch: patches that are drawn in an epoch, whatever the size of the cohort.

    Raises:
        ValueError: a value out of range.
    """

    spacing_mm: tuple[float, float] | None = None
    step: float = 0.5
    mirror: bool = True
    foreground: float = 1 / 3
    samples_per_epoch: int = 3000

    def __post_init__(self) -> None:
        low, high = _SPACINGS_MM
        if self.spacing_mm is not None and not all(low <= step <= high for step in self.spacing_mm):
            want = f"two lengths of {low:g} to {high:g} mm"
            raise ValueError(f"patches.spacing_mm must be {want}, got {self.spacing_mm}")
        if not 0 < self.step <= 1:
            raise ValueError(f"patches.step must be in (0, 1], got {self.step}")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"patches.foreground must be in [0, 1], got {self.foreground}")
        if self.samples_per_epoch < 1:
            raise ValueError(f"patches.samples_per_epoch must be at least 1, got {self.samples_per_epoch}")


@dataclass(frozen=True)
class Preprocessing:
    """How volumes become network inputs.

    Attributes:
        intensity: what becomes of a volume's values: clipped to ``percentiles`` and scaled to [0, 1]
            (``"percentiles"``); clipped to ``window`` and scaled to [0, 1] (``"window"``); scaled to [0, 1]
            (``"minmax"``); mean 0 and standard deviation 1 (``"zscore"``); left alone (``"as_is"``), for files that
            were prepared before, such as those of the Synapse package.
        window: intensities are clipped to these, lowest and highest, in the image's unit; (-125, 275) HU for abdominal
            CT.
        resize: ``"linear"`` (bilinear and antialiased, labels by the nearest neighbour; pixels are areas) or
            ``"cubic"`` (cubic spline, labels of order 0; the centres of the corner pixels stay where they are).
            Splines overshoot, which is not clipped.
        channels: 3, the image repeated and normalised as ImageNet encoders expect, or 1, the image alone.
        restore: how predictions get back to the image's size: ``"logits"`` are interpolated bilinearly before the
            argmax, or ``"labels"`` are chosen first and resized as ``resize`` does it with labels.
        image_size: side of the square that slices are resized to, in pixels; with ``patches``, of a patch.
        nonfinite: what to do with NaN and infinite voxels, see `NonFinite`.
        patches: how slices are seen patch by patch, at one spacing; None resizes whole slices.
        percentiles: of the volume, to which its values are clipped; with ``"zscore"`` before mean and standard
            deviation are taken. None is (1, 99) for ``"percentiles"``, and no clipping for ``"zscore"``.

    Raises:
        ValueError: a window or percentiles that are not needed, or a window that is needed and missing; an empty range
            of either; an image size that is none; or a way to
            resize or restore that patches, which are resampled in their own way, do not have.
    """

    intensity: Literal["percentiles", "window", "minmax", "zscore", "as_is"] = "percentiles"
    window: tuple[float, float] | None = None
    resize: Literal["linear", "cubic"] = "linear"
    channels: Literal[1, 3] = 3
    restore: Literal["logits", "labels"] = "logits"
    image_size: int = 448
    nonfinite: NonFinite = "error"
    patches: Patches | None = None
    percentiles: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.intensity != "window":
            if self.window is not None:
                raise ValueError(f"window: expected none with intensity = {self.intensity!r}, got {self.window}")
        elif self.window is None or not -math.inf < self.window[0] < self.window[1] < math.inf:
            want = "its lowest and highest value, such as (-125, 275) HU"
            raise ValueError(f"window: expected {want} with intensity = 'window', got {self.window}")
        self._check_percentiles()
        if not 1 <= self.image_size <= _LARGEST_SIZE:
            raise ValueError(f"image_size must be 1 to {_LARGEST_SIZE} pixels, got {self.image_size}")
        if self.patches is not None and (self.resize, self.restore) != ("linear", "logits"):
            raise ValueError(
                "preprocessing.resize and .restore are for whole slices; patches are resampled in their own way"
            )

    def _check_percentiles(self) -> None:
        if self.percentiles is None:
            return
        if self.intensity not in ("percentiles", "zscore"):
            raise ValueError(f"percentiles: expected none with intensity = {self.intensity!r}, got {self.percentiles}")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            want = "the lowest and the highest, from 0 to 100, such as (0.5, 99.5)"
            raise ValueError(f"percentiles: expected {want}, got {self.percentiles}")

    @property
    def clip_percentiles(self) -> tuple[float, float] | None:
        """The percentiles that values are clipped to, chosen or not; None clips to none."""
        return self.percentiles or (CLIP_PERCENTILES if self.intensity == "percentiles" else None)

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: their percentiles were the 1st and the 99th."""
        return {"percentiles": None, **values}


def names_of_scaling(preprocessing: Preprocessing, *further: Any) -> list[Any]:
    """Name all that a volume's scaled values depend on, and what else: cache entries are found by it."""
    names: list[Any] = [preprocessing.intensity, preprocessing.window, *further]
    return names if preprocessing.percentiles is None else [*names, preprocessing.percentiles]  # as older ones have it


def patches_and_spacing(preprocessing: Preprocessing) -> tuple[Patches, tuple[float, float]]:
    """Return the patches of a preprocessing and their spacing in mm, rows and columns.

    Raises:
        ValueError: it is for whole slices, or leaves the spacing to the cohort.
    """
    patches = preprocessing.patches
    if patches is None or patches.spacing_mm is None:
        got = "whole slices" if patches is None else "None"
        raise ValueError(f"patches.spacing_mm: expected two lengths in mm, got {got}; median_spacing_mm finds them")
    return patches, patches.spacing_mm
