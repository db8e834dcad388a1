"""Augmentations of a slice: image and target move together, and the generator alone decides how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from trifuse.kernels.errors import MissingExtra

from .strengths import Range, check_strengths


@dataclass(frozen=True)
class FlipRotate:
    """Turn a slice by right angles and mirror it: by default one of the eight symmetries of the square.

    Each of those is as likely as any other.

    Attributes: see `AugmentationRecipe`.

    Raises:
        ValueError: a strength that makes no sense.
    """

    right_angles: bool = True
    mirror_probability: float = 0.5
    mirror_axes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        check_strengths(self)

    def __call__(self, image: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Turn an image (C, S, S) and its target (S, S) in the same way."""
        turns = _drawn(4, generator) if self.right_angles else 0
        axes = [axis for axis in self.mirror_axes if _chance(self.mirror_probability, generator)]
        return _turn(image, turns, axes), _turn(target, turns, axes)


@dataclass(frozen=True)
class TransUNetAugmentation:
    """Turn, tilt, scale and shift slices as networks for the Synapse and ACDC sets are trained with.

    Half of the slices are turned by 0 to 3 right angles and mirrored along a random axis. Of the others, half are
    rotated by a whole number of degrees in [-20, 20). Whatever came of that, half are scaled by a factor in
    [0.9, 1.1], and half are shifted by up to a tenth of their size along either axis, in one bilinear interpolation;
    a target takes the nearest pixel throughout. What comes in from outside is background, and as dark as the image's
    darkest pixel. These numbers are the defaults.

    Attributes: see `AugmentationRecipe`.

    Raises:
        ValueError: a strength that makes no sense.
        MissingExtra: scipy is not installed.

    Source: TransUNet's random generator for turns and rotations; scale and shift from FIAS' list of augmentations.
    """

    right_angles: bool = True
    mirror_probability: float = 0.5
    mirror_axes: tuple[int, ...] = (0, 1)
    rotation_probability: float = 0.5
    rotation_degrees: float = 20.0
    rotate_image_order: int = 0
    scale_probability: float = 0.5
    scale_range: Range = (0.9, 1.1)
    shift_probability: float = 0.5
    shift_limit: float = 0.1

    def __post_init__(self) -> None:
        check_strengths(self)
        _scipy_ndimage()

    def __call__(self, image: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Transform an image (C, S, S) and its target (S, S) in the same way."""
        if _chance(self.mirror_probability, generator):
            turns = _drawn(4, generator) if self.right_angles else 0
            axes = [self.mirror_axes[_drawn(len(self.mirror_axes), generator)]] if self.mirror_axes else []
            image, target = _turn(image, turns, axes), _turn(target, turns, axes)
        elif _chance(self.rotation_probability, generator):
            angle = _whole_degrees(self.rotation_degrees, generator)
            image, target = _resample(image, target, _rotation(angle), (0.0, 0.0), order=self.rotate_image_order)
        scaled, shifted = (_chance(often, generator) for often in (self.scale_probability, self.shift_probability))
        parts = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if scaled or shifted:
            zoom = torch.eye(2, dtype=torch.float64) / (_within(self.scale_range, parts[0]) if scaled else 1.0)
            limit = self.shift_limit if shifted else 0.0
            offset = tuple(_about_zero(limit, part) * side for part, side in zip(parts[1:], target.shape, strict=True))
            image, target = _resample(image, target, zoom, offset, order=1)
        return image.contiguous(), target.contiguous()


def _drawn(choices: int, generator: torch.Generator) -> int:
    return int(torch.randint(choices, (), generator=generator))


def _chance(probability: float, generator: torch.Generator) -> bool:
    """Say yes as often as asked; one half is the toss of a coin, as it has always been drawn."""
    if probability == 0.5:
        return _drawn(2, generator) == 1
    return float(torch.rand((), generator=generator)) < probability


def _whole_degrees(limit: float, generator: torch.Generator) -> int:
    """Draw a whole number in [-limit, limit)."""
    lowest, end = math.ceil(-limit), math.ceil(limit)
    return lowest + _drawn(max(end - lowest, 1), generator)


def _within(limits: Range, part: float) -> float:
    """Return the number at that part of the way from the lowest to the highest."""
    middle, half = (round((limits[1] + sign * limits[0]) / 2, 12) for sign in (1, -1))  # (1.1 - 0.9) / 2 is 0.1
    return middle + _about_zero(half, part)


def _about_zero(limit: float, part: float) -> float:
    return part * (2 * limit) - limit


def _turn(plane: Tensor, turns: int, axes: Sequence[int]) -> Tensor:
    """Turn a plane (..., S, S) by right angles, then mirror it along axes 0, of its rows, and 1, of its columns."""
    return torch.rot90(plane, turns, dims=(-2, -1)).flip([axis - 2 for axis in axes]).contiguous()


def _rotation(degrees: float) -> Tensor:
    """Return the matrix that finds, for a pixel of the rotated plane, where it came from; rows and columns."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)


def _resample(
    image: Tensor, target: Tensor, matrix: Tensor, shift: tuple[float, ...], order: int
) -> tuple[Tensor, Tensor]:
    """Move both by a matrix about the centre and then by a shift in pixels."""
    ndimage = _scipy_ndimage()
    centre = (torch.tensor(target.shape, dtype=torch.float64) - 1) / 2
    offset = centre - matrix @ (centre + torch.tensor(shift, dtype=torch.float64))

    def moved(plane: Tensor, order: int, outside: float) -> Tensor:
        options = {"offset": offset.numpy(), "order": order, "mode": "constant", "cval": outside}
        return torch.from_numpy(ndimage.affine_transform(plane.numpy(), matrix.numpy(), **options))

    return torch.stack([moved(plane, order, float(plane.min())) for plane in image]), moved(target, 0, 0)


def _scipy_ndimage() -> ModuleType:
    try:
        from scipy import ndimage
    except ImportError:
        raise MissingExtra("scipy", "med", "rotating and scaling slices") from None
    return ndimage
