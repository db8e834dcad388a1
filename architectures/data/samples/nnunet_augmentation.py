"""nnU-Net's augmentation of 2-D patches: image, labels and prior move together, and the generator alone decides how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .strengths import Range, check_strengths

_TINY = 1e-7  # contrast below which there is none
_RADIUS_OF_SIGMA = 4  # where a Gaussian is cut off


@dataclass(frozen=True)
class NnUNetAugmentation:
    """Turn, scale and mirror patches, and change the image's values, as nnU-Net 2D does.

    Rotation and scaling are one interpolation, about the centre: bilinear for the image, as in nnU-Net, because it
    cannot overshoot; the nearest pixel for labels and prior, so that a segment stays a segment. It looks at a larger
    part of the slice than a patch (`source_size`), so that nothing comes in from outside that the slice could show.
    The values of labels and prior are never changed, those of the image in the order of the fields. Factors are
    drawn as often below as above one.

    Attributes: see `AugmentationRecipe`; ranges of factors may lie on either side of one.

    Raises:
        ValueError: a strength that makes no sense.

    Source: nnU-Net v2. Its probabilities of blur and low resolution per image and per channel (0.5) are multiplied
    here: there is one channel.
    """

    mirror_probability: float = 0.5
    mirror_axes: tuple[int, ...] = (0, 1)
    rotation_probability: float = 0.2
    rotation_degrees: float = 180.0
    scale_probability: float = 0.2
    scale_range: Range = (0.7, 1.4)
    noise_probability: float = 0.1
    noise_variance: Range = (0.0, 0.1)
    blur_probability: float = 0.2 * 0.5
    blur_sigma_px: Range = (0.5, 1.0)
    brightness_probability: float = 0.15
    brightness_range: Range = (0.75, 1.25)
    contrast_probability: float = 0.15
    contrast_range: Range = (0.75, 1.25)
    low_resolution_probability: float = 0.25 * 0.5
    low_resolution_range: Range = (0.5, 1.0)
    gamma_inverted_probability: float = 0.1
    gamma_probability: float = 0.3
    gamma_range: Range = (0.7, 1.5)

    def __post_init__(self) -> None:
        check_strengths(self)

    @property
    def rotates(self) -> bool:
        """Whether patches are ever rotated."""
        return self.rotation_probability > 0 and self.rotation_degrees > 0

    @property
    def mirrors(self) -> bool:
        """Whether patches are ever mirrored."""
        return self.mirror_probability > 0 and len(self.mirror_axes) > 0

    def source_size(self, patch_size: int) -> int:
        """Return the side of the square that holds all that may be seen in a patch; the margins are whole pixels."""
        widest = math.sqrt(2) if self.rotates else 1.0
        widest /= min(self.scale_range[0], 1.0) if self.scale_probability else 1.0
        return patch_size + 2 * math.ceil((widest - 1) * patch_size / 2)

    def __call__(
        self, image: Tensor, target: Tensor, prior: Tensor | None, generator: torch.Generator, patch_size: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Cut a patch out of the middle of a square: an image (1, S, S), its target and its prior (S, S), if any.

        Returns:
            Those three of side P, and how they were moved: the matrix (2, 3) that says where each position of the patch
            lay in the patch as it would have been, as `torch.nn.functional.affine_grid` takes it.
        """
        draws = _Draws(generator)
        labels = [target] if prior is None else [target, prior]
        image, labels, transform = self._move(image, labels, draws, patch_size)
        image = self._change_values(image, draws)
        axes = [axis - 2 for axis in self.mirror_axes if draws.chance(self.mirror_probability)]
        if axes:
            image, labels = image.flip(axes), [plane.flip(axes) for plane in labels]
            transform = transform @ mirroring(axes)
        return image, labels[0], None if prior is None else labels[1], F.pad(transform, (0, 1))

    def _move(
        self, image: Tensor, labels: list[Tensor], draws: _Draws, patch_size: int
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        limits = (-self.rotation_degrees, self.rotation_degrees)
        angle = math.radians(draws.between(limits)) if draws.chance(self.rotation_probability) else 0.0
        scale = draws.factor(self.scale_range) if draws.chance(self.scale_probability) else 1.0
        margin = (image.shape[-1] - patch_size) // 2
        if (angle, scale) == (0.0, 1.0):
            inner = slice(margin, margin + patch_size)
            return image[:, inner, inner], [plane[inner, inner] for plane in labels], torch.eye(2)
        step = patch_size / image.shape[-1] / scale  # of the coordinates, which run from -1 to 1
        cosine, sine = math.cos(angle), math.sin(angle)
        turned = torch.tensor([[cosine, sine], [-sine, cosine]])
        grid = F.affine_grid(F.pad(step * turned, (0, 1))[None], [1, 1, patch_size, patch_size], align_corners=False)
        moved = F.grid_sample(image[None], grid, mode="bilinear", align_corners=False)[0]
        values = torch.stack([plane.to(moved.dtype) for plane in labels])
        values = F.grid_sample(values[None], grid, mode="nearest", align_corners=False)[0]
        return moved, [new.to(old.dtype) for new, old in zip(values, labels, strict=True)], turned / scale

    def _change_values(self, image: Tensor, draws: _Draws) -> Tensor:
        if draws.chance(self.noise_probability):
            deviation = math.sqrt(draws.between(self.noise_variance))
            image = image + deviation * torch.randn(image.shape, generator=draws.generator)
        if draws.chance(self.blur_probability):
            image = _blurred(image, draws.between(self.blur_sigma_px))
        if draws.chance(self.brightness_probability):
            image = image * draws.factor(self.brightness_range)
        if draws.chance(self.contrast_probability):
            mean, low, high = image.mean(), image.amin(), image.amax()
            image = ((image - mean) * draws.factor(self.contrast_range) + mean).clamp(low, high)
        if draws.chance(self.low_resolution_probability):
            image = _at_resolution(image, draws.between(self.low_resolution_range))
        if draws.chance(self.gamma_inverted_probability):
            image = -_raised(-image, draws.factor(self.gamma_range))
        if draws.chance(self.gamma_probability):
            image = _raised(image, draws.factor(self.gamma_range))
        return image


def mirroring(axes: Sequence[int]) -> Tensor:
    """Return the matrix (2, 2) that mirrors positions (x, y) along axes -1, of x, and -2, of y."""
    return torch.tensor([-1.0 if axis in axes else 1.0 for axis in (-1, -2)]).diag()


class _Draws:
    """Random numbers of one sample, in the order that they are asked for."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def chance(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def between(self, limits: Range) -> float:
        low, high = limits
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def factor(self, limits: Range) -> float:
        low, high = limits
        if low < 1 < high:
            low, high = (low, 1.0) if self.chance(0.5) else (1.0, high)
        return self.between((low, high))


def _blurred(image: Tensor, sigma_px: float) -> Tensor:
    radius = min(math.ceil(_RADIUS_OF_SIGMA * sigma_px), image.shape[-1] - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma_px) ** 2)
    kernel = (kernel / kernel.sum())[None, None]
    padded = F.pad(image[None], (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[..., None]), kernel[:, :, None])[0]


def _at_resolution(image: Tensor, part: float) -> Tensor:
    side = image.shape[-1]
    few = F.interpolate(image[None], size=max(1, round(side * part)), mode="nearest-exact")
    return F.interpolate(few, size=side, mode="bicubic", align_corners=False)[0]


def _raised(image: Tensor, power: float) -> Tensor:
    """Raise values, counted from the least as parts of the largest, to a power; keep mean and standard deviation."""
    low, mean, deviation = image.amin(), image.mean(), image.std()
    spread = (image.amax() - low).clamp_min(_TINY)
    raised = ((image - low) / spread) ** power
    return (raised - raised.mean()) / raised.std().clamp_min(_TINY) * deviation + mean
