"""Augmentations of a slice: image and target move together, and the generator alone decides how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from trifuse.kernels.errors import MissingExtra


@dataclass(frozen=True)
class FlipRotate:
    """Apply one of the eight symmetries of the square, each as likely as any other."""

    def __call__(self, image: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Turn an image (C, S, S) and its target (S, S) in the same way."""
        turns = _drawn(4, generator)
        mirrored = _drawn(2, generator) == 1
        return _turn(image, turns, mirrored), _turn(target, turns, mirrored)


@dataclass(frozen=True)
class TransUNetAugmentation:
    """Turn, tilt, scale and shift slices as networks for the Synapse and ACDC sets are trained with.

    Half of the slices are turned by 0 to 3 right angles and mirrored along a random axis. Of the others, half are
    rotated by a whole number of degrees in [-20, 20). Whatever came of that, half are scaled by a factor in
    [0.9, 1.1], and half are shifted by up to a tenth of their size along either axis, in one bilinear interpolation;
    a target takes the nearest pixel throughout. What comes in from outside is background, and as dark as the image's
    darkest pixel.

    Args:
        rotate_image_order: of the spline that rotates the image; TransUNet rotates it like the target, with order 0.

    Raises:
        MissingExtra: scipy is not installed.

    Source: TransUNet's random generator for turns and rotations; scale and shift from FIAS' list of augmentations.
    """

    rotate_image_order: int = 0

    def __post_init__(self) -> None:
        _scipy_ndimage()

    def __call__(self, image: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Transform an image (C, S, S) and its target (S, S) in the same way."""
        if _drawn(2, generator):
            turns, axis = _drawn(4, generator), _drawn(2, generator) - 2
            image, target = (torch.rot90(plane, turns, dims=(-2, -1)).flip(axis) for plane in (image, target))
        elif _drawn(2, generator):
            angle = _drawn(40, generator) - 20
            image, target = _resample(image, target, _rotation(angle), (0.0, 0.0), order=self.rotate_image_order)
        scaled, shifted = _drawn(2, generator), _drawn(2, generator)
        factor, *shifts = (torch.rand(3, generator=generator, dtype=torch.float64) * 0.2 - 0.1).tolist()
        if scaled or shifted:
            zoom = torch.eye(2, dtype=torch.float64) / (1 + scaled * factor)
            offset = tuple(shifted * part * side for part, side in zip(shifts, target.shape, strict=True))
            image, target = _resample(image, target, zoom, offset, order=1)
        return image.contiguous(), target.contiguous()


def _drawn(choices: int, generator: torch.Generator) -> int:
    return int(torch.randint(choices, (), generator=generator))


def _turn(plane: Tensor, turns: int, mirrored: bool) -> Tensor:
    plane = torch.rot90(plane, turns, dims=(-2, -1))
    return (plane.flip(-1) if mirrored else plane).contiguous()


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
