"""How training samples are varied: which kind of augmentation, and how strong it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .augmentation import FlipRotate, TransUNetAugmentation
from .nnunet_augmentation import NnUNetAugmentation
from .strengths import Range, check_strengths

AugmentationKind = Literal["none", "flip_rot", "transunet", "nnunet"]
KINDS: dict[str, type] = {"flip_rot": FlipRotate, "transunet": TransUNetAugmentation, "nnunet": NnUNetAugmentation}
_PROBABILITY = "_probability"


@dataclass(frozen=True)
class AugmentationRecipe:
    """How strong an augmentation is; None leaves a strength as the kind has it by default.

    The three kinds differ in what they do, and in their defaults: see `FlipRotate`, `TransUNetAugmentation`,
    `NnUNetAugmentation`.

    Attributes:
        right_angles: whether slices are turned by 0 to 3 right angles.
        mirror_probability: how often a sample is mirrored along each axis; of ``"transunet"``, how often it is turned
            by right angles, and mirrored along one axis, instead of rotated.
        mirror_axes: those along which samples are mirrored: 0 turns them upside down, 1 swaps left and right.
        rotation_probability: how often a sample is rotated; of ``"transunet"``, of those that are not turned.
        rotation_degrees: by angles between minus and plus this; of ``"transunet"`` by whole numbers.
        rotate_image_order: of the spline that rotates the image; with 0 it is rotated as the target is.
        scale_probability: how often a sample is scaled,
        scale_range: and by which factors; above one it grows.
        shift_probability: how often a sample is shifted,
        shift_limit: by up to this part of its side along either axis.
        noise_probability, noise_variance: of Gaussian noise.
        blur_probability, blur_sigma_px: of a Gaussian filter.
        brightness_probability, brightness_range: of all values times a factor.
        contrast_probability, contrast_range: of the distances from the mean times a factor, clipped to the values
            before.
        low_resolution_probability, low_resolution_range: of the image reduced to a part of its pixels, by the nearest,
            and cubically enlarged again.
        gamma_inverted_probability: how often the values between the least and the largest are raised to a power,
            counted from the largest,
        gamma_probability: how often, counted from the least,
        gamma_range: and to which powers; mean and standard deviation stay as they were.

    Raises:
        ValueError: a strength that makes no sense.
    """

    right_angles: bool | None = None
    mirror_probability: float | None = None
    mirror_axes: tuple[int, ...] | None = None
    rotation_probability: float | None = None
    rotation_degrees: float | None = None
    rotate_image_order: int | None = None
    scale_probability: float | None = None
    scale_range: Range | None = None
    shift_probability: float | None = None
    shift_limit: float | None = None
    noise_probability: float | None = None
    noise_variance: Range | None = None
    blur_probability: float | None = None
    blur_sigma_px: Range | None = None
    brightness_probability: float | None = None
    brightness_range: Range | None = None
    contrast_probability: float | None = None
    contrast_range: Range | None = None
    low_resolution_probability: float | None = None
    low_resolution_range: Range | None = None
    gamma_inverted_probability: float | None = None
    gamma_probability: float | None = None
    gamma_range: Range | None = None

    def __post_init__(self) -> None:
        check_strengths(self)

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: what they do not mention was as it is by default."""
        return {**dict.fromkeys(_names(AugmentationRecipe)), **values}

    @property
    def given(self) -> dict[str, Any]:
        """The strengths that are not left to the kind."""
        values = {name: getattr(self, name) for name in _names(type(self))}
        return {name: value for name, value in values.items() if value is not None}

    def check(self, kind: AugmentationKind) -> None:
        """Refuse strengths that a kind of augmentation does not have.

        Raises:
            ValueError: naming them, and the kinds that have them.
        """
        problems = []
        for name, value in self.given.items():
            having = [repr(other) for other, made in KINDS.items() if name in _names(made)]
            if repr(kind) not in having:
                problems.append(
                    f"augmentation.{name}: expected none with augment={kind!r}, which has no such strength, got "
                    f"{value!r}; leave it out, or set augment to {' or '.join(having)}"
                )
        if problems:
            raise ValueError("\n".join(problems))

    def make(self, kind: AugmentationKind) -> Any:
        """Return the augmentation of that kind, None for ``"none"``.

        Raises:
            ValueError: see `check`.
            MissingExtra: it needs scipy, which is not installed.
        """
        self.check(kind)
        return None if kind == "none" else KINDS[kind](**self.given)

    def describe(self, kind: AugmentationKind) -> str:
        """Say in words what the augmentation of that kind does, with every strength."""
        if kind == "none":
            return "none"
        values = {field.name: field.default for field in fields(KINDS[kind])} | self.given
        effects = [name.removesuffix(_PROBABILITY) for name in values if name.endswith(_PROBABILITY)]
        parts: dict[str, list[str]] = {}
        for name, value in values.items():
            effect = max((each for each in effects if name.startswith(f"{each}_")), key=len, default="")
            strength = name.removeprefix(f"{effect}_").replace("_", " ")
            parts.setdefault(effect, []).append(f"{strength} {_in_words(value)}")
        said = (
            f"{effect.replace('_', ' ')} ({', '.join(of)})" if effect else ", ".join(of) for effect, of in parts.items()
        )
        return f"{kind}: {'; '.join(said)}"


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple) and all(type(one) is int for one in value):
        return " and ".join(map(str, value)) or "none"
    return " to ".join(f"{one:g}" for one in value) if isinstance(value, tuple) else f"{value:g}"
