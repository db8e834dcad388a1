"""Overlap, volume and surface scores of one mask against its reference, under a named convention for empty masks.

Published tools disagree exactly where a mask is empty, and by how HD95 pools its distances. None of those cases is left
to a library here: `EMPTY_MASK_SCORES` holds every cell, and `Conventions` names the choice in every table made with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trifuse.kernels import MissingExtra, ShapeError
from trifuse.kernels.choices import check_choice

Mask = NDArray[np.bool_]

NAN = math.nan
DIAGONAL = math.inf  # stands in the table below for "as far away as this image allows"
MM3_PER_ML = 1000.0
UNIT_NAMES = {"mm": "mm", "ml": "mL", "vox": "voxels"}

# (DSC, IoU, precision, sensitivity, HD95) where a mask is empty; where neither is, the formulas hold.
# strict is ours; the others are what the named code does. TransUNet has no IoU (its descendant MERIT's stands here) and
# no precision or sensitivity (the bare ratio stands here); nnU-Net has no HD95; MONAI's are its defaults.
EMPTY_MASK_SCORES: dict[str, dict[str, tuple[float, float, float, float, float]]] = {
    "strict": {
        "both": (1.0, 1.0, 1.0, 1.0, 0.0),
        "truth": (0.0, 0.0, 0.0, NAN, DIAGONAL),
        "prediction": (0.0, 0.0, NAN, 0.0, DIAGONAL),
    },
    "transunet": {
        "both": (0.0, 0.0, NAN, NAN, 0.0),
        "truth": (1.0, 1.0, 0.0, NAN, 0.0),
        "prediction": (0.0, 0.0, NAN, 0.0, 0.0),
    },
    "nnunet": {
        "both": (NAN, NAN, NAN, NAN, NAN),
        "truth": (0.0, 0.0, 0.0, NAN, NAN),
        "prediction": (0.0, 0.0, NAN, 0.0, NAN),
    },
    "monai": {
        "both": (NAN, NAN, NAN, NAN, NAN),
        "truth": (NAN, NAN, 0.0, NAN, NAN),
        "prediction": (0.0, 0.0, NAN, 0.0, NAN),
    },
}

_EMPTY_MASK_SENTENCES = {
    "strict": "both masks empty: DSC 1, HD95 0; one empty: DSC 0, HD95 {hd_empty}",
    "transunet": "both masks empty: DSC 0, HD95 0; only the truth empty: DSC 1, HD95 0; "
    "only the prediction empty: DSC 0, HD95 0 (flatters; for comparison with published tables only)",
    "nnunet": "both masks empty: NaN, left out of the mean; one empty: DSC 0; HD95 NaN in either case",
    "monai": "truth empty: DSC NaN, left out of the mean; only the prediction empty: DSC 0; HD95 NaN in either case",
}

_CHOICES = {
    "empty_masks": tuple(EMPTY_MASK_SCORES),
    "percentile": ("pooled", "max"),
    "hd_empty": ("diagonal", "nan"),
    "hd_unit": ("mm", "vox"),
    "volume": ("absolute", "signed", "relative", "signed_relative"),
    "volume_unit": ("ml", "vox"),
    "aggregation": ("volume", "slice"),
    "slices": ("all", "labelled"),
}


@dataclass(frozen=True)
class Conventions:
    """Everything that must be known to compare two tables of scores.

    Args:
        empty_masks: what a score is where a mask is empty: ``strict``, ``transunet``, ``nnunet`` or ``monai``.
        percentile: HD95 from both directed distance sets ``pooled`` (medpy), or the ``max`` of the two directed
            percentiles (MONAI). Empty: the habit of ``empty_masks``.
        hd_empty: HD95 where strict leaves it undefined: the image's ``diagonal``, or ``nan``.
        hd_unit: HD95 in ``mm``, or in voxels (``vox``). Empty: the habit of ``empty_masks``, voxels for ``transunet``
            and its descendants, mm for the others.
        volume: volume difference ``absolute`` or ``signed``, or divided by the true volume (``relative``,
            ``signed_relative``).
        volume_unit: of an absolute or signed difference: ``ml``, or voxels (``vox``).
        aggregation: one score per ``volume``, or per ``slice``.
        slices: score ``all`` slices, or only the ``labelled`` ones, on which anything is drawn.

    Raises:
        ValueError: for a word that is none of the above.
    """

    empty_masks: str = "strict"
    percentile: str = ""
    hd_empty: str = "diagonal"
    hd_unit: str = ""
    volume: str = "absolute"
    volume_unit: str = "ml"
    aggregation: str = "volume"
    slices: str = "all"

    def __post_init__(self) -> None:
        if not self.percentile:
            object.__setattr__(self, "percentile", "max" if self.empty_masks == "monai" else "pooled")
        if not self.hd_unit:
            object.__setattr__(self, "hd_unit", "vox" if self.empty_masks == "transunet" else "mm")
        for field, allowed in _CHOICES.items():
            check_choice(field, getattr(self, field), allowed)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the scores, with their units, in the order of a table."""
        volume = f"volume_difference_{'relative' if 'relative' in self.volume else self.volume_unit}"
        return ("dsc", "iou", "precision", "sensitivity", volume, self.hd95)

    @property
    def hd95(self) -> str:
        """The name of the 95th percentile of the distances, with its unit."""
        return f"hd95_{self.hd_unit}"

    def in_voxels(self) -> Conventions:
        """Return the same conventions for images without a spacing: nothing in mm, nothing in mL."""
        return replace(self, hd_unit="vox", volume_unit="vox")

    @property
    def label(self) -> str:
        """The conventions as one machine-readable cell, the inverse of `from_label`."""
        return ";".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @classmethod
    def from_label(cls, label: str) -> Conventions:
        """Read back what `label` wrote; raise ValueError for anything else."""
        try:
            return cls(**dict(part.split("=", 1) for part in label.split(";")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{label!r} does not name the conventions of a table: {error}") from error

    def describe(self) -> str:
        """Return the sentence that stands beside every table."""
        empty = _EMPTY_MASK_SENTENCES[self.empty_masks].format(
            hd_empty="the image diagonal" if self.hd_empty == "diagonal" else "NaN"
        )
        unit = "mm, true spacing" if self.hd_unit == "mm" else "voxels, spacing ignored"
        pooled = "both directions pooled" if self.percentile == "pooled" else "larger of the two directions"
        slices = "all slices" if self.slices == "all" else "the slices that somebody labelled, and no others"
        volume_unit = "share of the true volume" if "relative" in self.volume else UNIT_NAMES[self.volume_unit]
        return (
            f"Empty masks `{self.empty_masks}` ({empty}). HD95: {pooled}, {unit}. "
            f"Volume difference: {self.volume.replace('_', ' ')}, {volume_unit}. "
            f"One score per {self.aggregation}, over {slices}."
        )


def case_metrics(
    prediction: ArrayLike,
    truth: ArrayLike,
    spacing_mm: Sequence[float] | None,
    convention: str | Conventions = "strict",
    *,
    voxel_ml: float | None = None,
) -> dict[str, float]:
    """Score one mask of shape (D, H, W) or (H, W) against its reference of the same shape.

    Args:
        prediction: the mask to judge; anything non-zero is foreground.
        truth: the reference mask.
        spacing_mm: voxel size along each axis in mm; None scores in voxels, whatever unit the convention prefers.
        convention: an empty-mask convention by name, or all `Conventions`.
        voxel_ml: volume of one voxel in mL; by default the product of ``spacing_mm``. Slices need it.

    Returns:
        ``dsc, iou, precision, sensitivity`` as fractions, ``volume_difference_ml`` (or ``_relative``, or ``_vox``) and
        ``hd95_mm`` (or ``_vox``): `Conventions.metrics`. NaN where the convention leaves a score undefined.

    Raises:
        ShapeError: the masks differ in shape, or the spacing does not fit them.

    Source: definitions and conventions of MONAI 1.6, medpy 0.5, nnU-Net 2 and TransUNet, as listed in this module.
    """
    chosen = Conventions(convention) if isinstance(convention, str) else convention
    if spacing_mm is None:
        chosen = chosen.in_voxels()
    p, t = _mask(prediction, "prediction"), _mask(truth, "truth")
    _check(p, t, spacing_mm)
    voxel = 1.0
    if chosen.volume_unit == "ml":
        assert spacing_mm is not None  # without one, all is in voxels
        voxel = math.prod(spacing_mm) / MM3_PER_ML if voxel_ml is None else voxel_ml

    volume = _volume_difference(int(p.sum()) * voxel, int(t.sum()) * voxel, chosen.volume)
    hd_spacing = spacing_mm if chosen.hd_unit == "mm" else None

    empty = _which_is_empty(p, t)
    if empty is None:
        overlap = _overlap(p, t)
        hd95 = hausdorff95(p, t, hd_spacing, percentile=chosen.percentile)
    else:
        *overlap, hd95 = EMPTY_MASK_SCORES[chosen.empty_masks][empty]
        if hd95 == DIAGONAL:
            hd95 = image_diagonal(t.shape, hd_spacing) if chosen.hd_empty == "diagonal" else NAN
    return dict(zip(chosen.metrics, [*overlap, volume, hd95], strict=True))


def dice(prediction: ArrayLike, truth: ArrayLike, empty_masks: str = "strict") -> float:
    """Return the DSC of one mask against its reference of the same shape, as `case_metrics` does, and nothing else.

    Args:
        prediction: the mask to judge; anything non-zero is foreground.
        truth: the reference mask.
        empty_masks: what the score is where a mask is empty, see `Conventions`.

    Raises:
        ShapeError: the masks differ in shape.
        ValueError: one of them is no mask.
    """
    p, t = _mask(prediction, "prediction"), _mask(truth, "truth")
    _check(p, t, None)
    empty = _which_is_empty(p, t)
    return _overlap(p, t)[0] if empty is None else EMPTY_MASK_SCORES[empty_masks][empty][0]


def failure_metrics(
    shape: Sequence[int] | None, spacing_mm: Sequence[float] | None, conventions: Conventions
) -> dict[str, float]:
    """Return the scores of a case whose prediction is missing or cannot be read: the worst of each, never a NaN DSC.

    ``shape`` and ``spacing_mm`` belong to the reference; without them HD95 is NaN. No convention softens this:
    an empty prediction can be right, a missing one cannot.
    """
    diagonal = NAN
    if shape is not None and conventions.hd_empty == "diagonal":
        diagonal = image_diagonal(shape, spacing_mm if conventions.hd_unit == "mm" else None)
    return dict(zip(conventions.metrics, [0.0, 0.0, 0.0, 0.0, NAN, diagonal], strict=True))


def hausdorff95(
    prediction: ArrayLike, truth: ArrayLike, spacing_mm: Sequence[float] | None = None, *, percentile: str = "pooled"
) -> float:
    """Return the 95th percentile of the distances between the borders of two non-empty masks.

    A border voxel is a foreground voxel with a background face neighbour; outside the array is background. Distances
    are exact Euclidean ones in mm, or in voxels without a spacing. ``pooled`` takes the percentile of both directed
    distance sets together, ``max`` the larger of the two directed percentiles.

    Raises:
        ShapeError: see `surface_distances`.

    Source: medpy 0.5 (``pooled``) and MONAI 1.6 (``max``); linear interpolation between order statistics in both.
    """
    directed = surface_distances(prediction, truth, spacing_mm)
    if percentile == "pooled":
        return float(np.percentile(np.concatenate(directed), 95))
    return float(max(np.percentile(distances, 95) for distances in directed))


def surface_distances(
    prediction: ArrayLike, truth: ArrayLike, spacing_mm: Sequence[float] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distance of each border voxel of one non-empty mask to the nearest of the other, in both directions.

    The first set starts from the prediction. The largest of all is the Hausdorff distance, the mean of the first set
    medpy's ASD, the mean of both sets together its ASSD.

    Raises:
        ShapeError: the masks differ in shape, are empty, or the spacing does not fit them.
    """
    p, t = np.asarray(prediction) != 0, np.asarray(truth) != 0
    _check(p, t, spacing_mm)
    if not p.any() or not t.any():
        raise ShapeError("HD95 needs two non-empty masks; case_metrics names a convention for empty ones")
    # All borders lie inside the box around both masks and all is background outside: cropping changes no distance.
    box = _bounding_box(p | t)
    p, t = p[box], t[box]
    p_border, t_border = _border(p), _border(t)
    return _distance_to(t_border, spacing_mm)[p_border], _distance_to(p_border, spacing_mm)[t_border]


def average_surface_distance(
    prediction: ArrayLike, truth: ArrayLike, spacing_mm: Sequence[float] | None = None
) -> float:
    """Return the mean distance between the borders of two non-empty masks, both directions pooled (ASSD).

    Raises:
        ShapeError: see `surface_distances`.

    Source: medpy 0.5, ``assd``; MONAI 1.6, ``compute_average_surface_distance`` with ``symmetric``.
    """
    return float(np.concatenate(surface_distances(prediction, truth, spacing_mm)).mean())


def surface_dice(
    prediction: ArrayLike, truth: ArrayLike, tolerance_mm: float, spacing_mm: Sequence[float] | None = None
) -> float:
    """Return the share of both borders' voxels that lie within a tolerance of the other border (NSD).

    The tolerance, included, is in mm, or in voxels without a spacing.

    Raises:
        ShapeError: see `surface_distances`.
        ValueError: the tolerance is negative or not finite.

    Source: Nikolov et al. (2021), "Clinically applicable segmentation of head and neck anatomy", J Med Internet Res 23,
    counted in border voxels, as MONAI 1.6 does by default.
    """
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"tolerance_mm must be a finite number, 0 or more; got {tolerance_mm}")
    distances = np.concatenate(surface_distances(prediction, truth, spacing_mm))
    return float((distances <= tolerance_mm).mean())


def image_diagonal(shape: Sequence[int], spacing_mm: Sequence[float] | None = None) -> float:
    """Return the length of the image's diagonal in mm, or in voxels without a spacing: no distance in it is longer."""
    sizes = np.asarray(shape, dtype=float) * (1.0 if spacing_mm is None else np.asarray(spacing_mm, dtype=float))
    return float(np.linalg.norm(sizes))


def _which_is_empty(p: Mask, t: Mask) -> str | None:
    """Return which mask is empty, in the words of `EMPTY_MASK_SCORES`; None if neither is."""
    return {(True, True): "both", (False, True): "truth", (True, False): "prediction"}.get((not p.any(), not t.any()))


def _overlap(p: Mask, t: Mask) -> list[float]:
    both = int((p & t).sum())
    in_p, in_t = int(p.sum()), int(t.sum())
    return [2 * both / (in_p + in_t), both / (in_p + in_t - both), both / in_p, both / in_t]


def _volume_difference(predicted: float, true: float, kind: str) -> float:
    difference = predicted - true
    if "relative" in kind and difference:
        difference = difference / true if true else NAN
    return difference if "signed" in kind else abs(difference)


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    axes = range(mask.ndim)
    occupied = (np.flatnonzero(mask.any(axis=tuple(a for a in axes if a != axis))) for axis in axes)
    return tuple(slice(int(where[0]), int(where[-1]) + 1) for where in occupied)


def _border(mask: Mask) -> Mask:
    ndimage = _ndimage()
    return mask & ~ndimage.binary_erosion(mask, ndimage.generate_binary_structure(mask.ndim, 1))


def _distance_to(border: Mask, spacing_mm: Sequence[float] | None) -> NDArray[np.float64]:
    return _ndimage().distance_transform_edt(~border, sampling=spacing_mm)


def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError:
        raise MissingExtra("scipy", "med", "evaluation of HD95") from None
    return ndimage


def _mask(values: ArrayLike, name: str) -> Mask:
    """Return where a mask is foreground.

    Raises:
        ValueError: it has two values beside 0, as maps of several classes and of probabilities do.
    """
    array = np.asarray(values)
    mask = array != 0
    if array.dtype != np.bool_ and len(found := array[mask]) and (found != found[0]).any():
        other = found[found != found[0]][0]
        raise ValueError(
            f"{name}: expected a mask, of 0 and one other value, got {found[0]:g} and {other:g} beside 0; score one "
            "class at a time, as prediction == 1, and threshold probabilities"
        )
    return mask


def _check(p: Mask, t: Mask, spacing_mm: Sequence[float] | None) -> None:
    if p.shape != t.shape:
        raise ShapeError(f"prediction and truth must have one shape; got {p.shape} and {t.shape}")
    if spacing_mm is None:
        return
    if len(spacing_mm) != p.ndim:
        raise ShapeError(f"a mask of shape {p.shape} needs {p.ndim} spacings in mm; got {tuple(spacing_mm)}")
    if not all(math.isfinite(step) and step > 0 for step in spacing_mm):
        raise ShapeError(f"spacings must be positive and finite, in mm; got {tuple(spacing_mm)}")
