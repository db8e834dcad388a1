"""The strengths of an augmentation: what was fixed before by default; each has an effect, or is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import get_type_hints

import pytest
import torch

from trifuse.architectures.data.samples.augmentation_recipe import KINDS, AugmentationRecipe
from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.runs.recipes import DataRecipe, RecipeError, recipe_from
from trifuse.architectures.storage.config_json import config_from_json, config_to_json, upgraded_json

P = 24
FIRST_VERSION = {  # of what `fingerprint` tells of seeds 0, 1, ...; made by commit af27769, without strengths
    "flip_rot": [
        (1709.1683, 13700, 0.088477), (1711.901, 13843, 0.403069), (1709.1683, 13700, 0.637114),
        (1687.8515, 13570, 0.285842), (1687.8515, 13570, 0.091457), (1712.8218, 13778, 0.90747),
    ],
    "transunet": [
        (1320.5694, 10546, 0.401717), (1424.1252, 11606, 0.524666), (1575.0198, 12723, 0.533229),
        (1561.1967, 12841, 0.451031), (1186.2245, 9433, 0.318912), (1705.2111, 13709, 0.564571),
    ],
    "nnunet": [
        (1576.6178, 13817, 0.425158), (1886.4916, 13817, 0.305149), (1709.0589, 13700, 0.908848),
        (1873.4963, 13547, 0.037897), (1668.4068, 13817, 0.387122), (1712.9132, 13982, 0.715006),
    ],
}  # fmt: skip
OTHERS = {  # another value of each strength
    "flip_rot": {"right_angles": False, "mirror_probability": 0.1, "mirror_axes": (0,)},
    "transunet": {
        "right_angles": False,
        "mirror_probability": 0.1,
        "mirror_axes": (1,),
        "rotation_probability": 0.1,
        "rotation_degrees": 5.0,
        "rotate_image_order": 1,
        "scale_probability": 0.1,
        "scale_range": (0.5, 0.7),
        "shift_probability": 0.1,
        "shift_limit": 0.3,
    },
    "nnunet": {
        "mirror_probability": 0.1,
        "mirror_axes": (0,),
        "rotation_probability": 0.9,
        "rotation_degrees": 10.0,
        "scale_probability": 0.9,
        "scale_range": (0.9, 1.0),
        "noise_probability": 0.9,
        "noise_variance": (1.0, 2.0),
        "blur_probability": 0.9,
        "blur_sigma_px": (2.0, 3.0),
        "brightness_probability": 0.9,
        "brightness_range": (3.0, 4.0),
        "contrast_probability": 0.9,
        "contrast_range": (0.1, 0.2),
        "low_resolution_probability": 0.9,
        "low_resolution_range": (0.1, 0.2),
        "gamma_inverted_probability": 0.9,
        "gamma_probability": 0.9,
        "gamma_range": (2.0, 3.0),
    },
}


@dataclass(frozen=True)
class Whole:
    data: DataRecipe = field(default_factory=DataRecipe)


def data_of(*settings):
    return recipe_from(Whole, None, {"data.root": "cohort"}, settings).data


def plane(side):
    """Return an image (1, side, side) and labels, whose middle does not depend on the side."""
    place = torch.arange(side) - (side - P) // 2
    number = 97 * place[:, None] + place
    return (number * 7919 % 101).float()[None] / 101, number * 31 % 9


def sample(augment, seed):
    """Return an image and its labels of side P, augmented, and the number that is drawn next."""
    generator = torch.Generator().manual_seed(seed)
    patches = hasattr(augment, "source_size")
    side = augment.source_size(P) if patches else P
    image, labels = plane(side)
    given = (image, labels, *((None, generator, P) if patches else (generator,)))
    image, labels = augment(*given)[:2]
    return image, labels, float(torch.rand((), generator=generator))


def fingerprint(augment, seed):
    image, labels, drawn = sample(augment, seed)
    places = torch.arange(P * P).reshape(P, P) % 13
    return float((image[0].double() * places).sum()), int((labels * places).sum()), drawn


# ------------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_what_was_fixed_before(kind):
    for seed, (image, labels, drawn) in enumerate(FIRST_VERSION[kind]):
        found = fingerprint(AugmentationRecipe().make(kind), seed)
        assert found == (pytest.approx(image, abs=1e-3), labels, pytest.approx(drawn, abs=1e-6))


def test_every_strength_of_a_kind_is_a_field_of_the_recipe():
    recipe = get_type_hints(AugmentationRecipe)
    strengths = {name: kind for made in KINDS.values() for name, kind in get_type_hints(made).items()}
    assert {field.name for field in fields(AugmentationRecipe)} == strengths.keys()
    assert recipe == {name: kind | None for name, kind in strengths.items()}
    assert {kind: set(others) for kind, others in OTHERS.items()} == {
        kind: {field.name for field in fields(made)} for kind, made in KINDS.items()
    }


def test_none_varies_nothing():
    assert AugmentationRecipe().make("none") is None


# ------------------------------------------------------------------------------------------------- strengths


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, others in OTHERS.items() for name in others])
def test_every_strength_changes_samples(kind, name):
    value = OTHERS[kind][name]
    patches = ["data.patches={}"] if kind == "nnunet" else []
    text = str(list(value) if isinstance(value, tuple) else value).lower()
    data = data_of(f"data.augmentation.{name}={text}", f"data.augment={kind}", *patches)
    assert data.augmentation == AugmentationRecipe(**{name: value})
    augment, plain = data.augmentation.make(kind), AugmentationRecipe().make(kind)
    assert any(not torch.equal(sample(augment, seed)[0], sample(plain, seed)[0]) for seed in range(40))


def moves(kind, **strengths):
    """Return the labels that an augmentation makes of a plane of numbers, each of 200 seeds."""
    augment = AugmentationRecipe(**strengths).make(kind)
    return [sample(augment, seed)[1] for seed in range(200)]


def symmetries(planes):
    """Return which of the square's symmetries, (turns, mirrored), made these planes; None is another change."""
    labels = plane(P)[1]
    known = {
        torch.rot90(labels.flip(-1) if mirrored else labels, turns).numpy().tobytes(): (turns, mirrored)
        for turns in range(4)
        for mirrored in (False, True)
    }
    return {known.get(made.numpy().tobytes()) for made in planes}


LEFT_RIGHT, UPSIDE_DOWN = (0, True), (2, True)


def test_flips_and_right_angles_are_left_out_one_by_one():
    assert symmetries(moves("flip_rot", right_angles=False)) == {(0, False), LEFT_RIGHT}
    assert symmetries(moves("flip_rot", right_angles=False, mirror_axes=(0,))) == {(0, False), UPSIDE_DOWN}
    assert symmetries(moves("flip_rot", right_angles=False, mirror_axes=(0, 1))) == {
        (0, False), LEFT_RIGHT, UPSIDE_DOWN, (2, False)
    }  # fmt: skip
    assert symmetries(moves("flip_rot", mirror_axes=())) == {(turns, False) for turns in range(4)}
    assert symmetries(moves("flip_rot", mirror_probability=1.0)) == {(turns, True) for turns in range(4)}


def test_transunet_s_turns_are_left_out_one_by_one():
    still = {"rotation_probability": 0.0, "scale_probability": 0.0, "shift_probability": 0.0}
    assert symmetries(moves("transunet", **still, right_angles=False)) == {(0, False), LEFT_RIGHT, UPSIDE_DOWN}
    assert symmetries(moves("transunet", **still, mirror_axes=())) == {(turns, False) for turns in range(4)}
    assert symmetries(moves("transunet", **still, mirror_probability=0.0)) == {(0, False)}
    assert symmetries(moves("transunet", **{**still, "rotation_probability": 1.0}, rotation_degrees=0.0)) <= {
        (turns, mirrored) for turns in range(4) for mirrored in (False, True)
    }


@pytest.mark.parametrize(("limit", "angles"), [(3.0, set(range(-3, 3))), (2.5, set(range(-2, 3))), (0.0, {0})])
def test_transunet_rotates_by_whole_degrees_within_the_limit(limit, angles, monkeypatch):
    from trifuse.architectures.data.samples import augmentation

    seen = []
    monkeypatch.setattr(augmentation, "_rotation", lambda degrees: seen.append(degrees) or torch.eye(2).double())
    moves("transunet", mirror_probability=0.0, rotation_probability=1.0, rotation_degrees=limit)
    assert set(seen) == angles


def test_transunet_scales_and_shifts_within_the_limits(monkeypatch):
    from trifuse.architectures.data.samples import augmentation

    seen = []

    def record(image, target, matrix, shift, order):
        seen.append((1 / float(matrix[0, 0]), *shift))
        return image, target

    monkeypatch.setattr(augmentation, "_resample", record)
    always = {"scale_probability": 1.0, "shift_probability": 1.0, "rotation_probability": 0.0}
    moves("transunet", **always, scale_range=(1.2, 1.6), shift_limit=0.25)
    factors, *shifts = zip(*seen, strict=True)
    assert 1.2 <= min(factors) < 1.22
    assert 1.58 < max(factors) <= 1.6
    for axis in shifts:
        assert -0.25 * P <= min(axis) < -0.24 * P
        assert 0.24 * P < max(axis) <= 0.25 * P


def test_nnunet_s_rotation_and_mirroring_keep_to_their_limits():
    """The transform that it returns tells both: its angle, and the sign of its columns."""
    image, labels = torch.zeros(1, 60, 60), torch.zeros(60, 60, dtype=torch.long)

    def transforms(**strengths):
        augment = AugmentationRecipe(scale_probability=0.0, **strengths).make("nnunet")
        return [augment(image, labels, None, torch.Generator().manual_seed(seed), P)[3] for seed in range(200)]

    turned = transforms(rotation_probability=1.0, rotation_degrees=30.0, mirror_axes=())
    angles = [math.degrees(math.atan2(matrix[0, 1], matrix[0, 0])) for matrix in turned]
    assert -30 <= min(angles) < -28
    assert 28 < max(angles) <= 30
    for axes, signs in (((), {(1, 1)}), ((0,), {(1, 1), (1, -1)}), ((1,), {(1, 1), (-1, 1)})):
        mirrored = transforms(rotation_degrees=0.0, mirror_axes=axes)
        assert {(int(matrix[0, 0]), int(matrix[1, 1])) for matrix in mirrored} == signs


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rotation_degrees=30"], "augmentation.rotation_degrees: expected none with augment='none', which has no such "
         "strength, got 30.0; leave it out, or set augment to 'transunet' or 'nnunet'"),
        (["shift_limit=0.2", "gamma_range=[1, 2]"], r"got 0.2; leave it out, or set augment to 'transunet'\n.*gamma_r"),
        (["rotation_degrees=181"], r"augmentation.rotation_degrees: expected an angle in \[0, 180\], got 181.0"),
        (["rotation_degrees=-5"], r"expected an angle in \[0, 180\], got -5.0"),
        (["rotation_degrees=NaN"], "expected a finite number or None, got nan"),
        (["rotation_degrees=wide"], "field 'rotation_degrees': expected a finite number or None, got 'wide'"),
        (["mirror_probability=1.5"], r"augmentation.mirror_probability: expected a probability in \[0, 1\], got 1.5"),
        (["mirror_axes=[2]"], r"expected \[\], \[0\], \[1\] or \[0, 1\], got \(2,\)"),
        (["mirror_axes=[1, 0]"], r"expected \[\], \[0\], \[1\] or \[0, 1\], got \(1, 0\)"),
        (["scale_range=[1.4, 0.7]"], r"scale_range: expected a lowest and a highest number above 0, got \(1.4, 0.7\)"),
        (["scale_range=[0, 1]"], r"expected a lowest and a highest number above 0, got \(0.0, 1.0\)"),
        (["scale_range=[1, Infinity]"], r"'scale_range': expected a list of a finite number, .* got \[1, inf\]"),
        (["low_resolution_range=[0.5, 1.5]"], r"part of the pixels, in \(0, 1\], got \(0.5, 1.5\)"),
        (["noise_variance=[-1, 1]"], "expected a lowest and a highest number, neither below 0, got"),
        (["rotate_image_order=6"], "expected a whole number from 0 to 5, got 6"),
        (["shift_limit=2"], r"expected a part of the side, in \[0, 1\], got 2.0"),
        (["blur_probability=2", "gamma_probability=-1"], r"got 2.0\n.*gamma_probability: expected a probability"),
        (["rotation=30"], "there is no field 'rotation'; did you mean 'rotation_degrees'"),
    ],
)  # fmt: skip
def test_strengths_that_make_no_sense(settings, message):
    with pytest.raises(RecipeError, match=rf"(?s){message}"):
        data_of(*(f"data.augmentation.{setting}" for setting in settings))


@pytest.mark.parametrize(("kind", "name"), [("flip_rot", "rotation_degrees"), ("transunet", "noise_variance"),
                                            ("nnunet", "shift_limit"), ("nnunet", "right_angles")])  # fmt: skip
def test_a_strength_that_the_kind_does_not_have(kind, name):
    patches = Patches() if kind == "nnunet" else None
    value = next(others[name] for others in OTHERS.values() if name in others)
    with pytest.raises(ValueError, match=f"{name}: expected none with augment='{kind}', which has no such strength"):
        DataRecipe(
            augment=kind,
            augmentation=AugmentationRecipe(**{name: value}),
            preprocessing=Preprocessing(patches=patches),
        )


def test_the_augmentations_refuse_them_as_well():
    for made in KINDS.values():
        with pytest.raises(ValueError, match=r"mirror_axes: expected \[\], .*, got \(3,\)"):
            made(mirror_axes=(3,))


# ---------------------------------------------------------------------------------------------- files and reports


def test_strengths_come_back_from_files(tmp_path):
    data = data_of("data.augment=transunet", "data.augmentation.scale_range=[1, 2]")
    assert config_from_json(DataRecipe, config_to_json(data), "run.json") == data
    file = tmp_path / "run.toml"
    file.write_text("[data]\naugment = 'transunet'\n[data.augmentation]\nscale_range = [1, 2]\n")
    assert recipe_from(Whole, file, {"data.root": "cohort"}).data == data


def test_a_run_without_strengths_has_the_defaults():
    """What older versions wrote, and one that knew fewer strengths."""
    old = config_to_json(DataRecipe(augment="transunet"))
    assert config_from_json(DataRecipe, {**old, "augmentation": {"shift_limit": 0.2}}, "run.json") == DataRecipe(
        augment="transunet", augmentation=AugmentationRecipe(shift_limit=0.2)
    )
    new = dict(old)
    del old["augmentation"]
    assert config_from_json(DataRecipe, old, "run.json") == DataRecipe(augment="transunet")
    assert upgraded_json(DataRecipe, old) == new  # what a resumed run compares
    assert upgraded_json(DataRecipe, {**old, "augmentation": {}}) == new


def test_in_words():
    words = {kind: AugmentationRecipe().describe(kind) for kind in ("none", *KINDS)}
    assert words == {
        "none": "none",
        "flip_rot": "flip_rot: right angles yes; mirror (probability 0.5, axes 1)",
        "transunet": "transunet: right angles yes, rotate image order 0; mirror (probability 0.5, axes 0 and 1); "
        "rotation (probability 0.5, degrees 20); scale (probability 0.5, range 0.9 to 1.1); "
        "shift (probability 0.5, limit 0.1)",
        "nnunet": "nnunet: mirror (probability 0.5, axes 0 and 1); rotation (probability 0.2, degrees 180); "
        "scale (probability 0.2, range 0.7 to 1.4); noise (probability 0.1, variance 0 to 0.1); "
        "blur (probability 0.1, sigma px 0.5 to 1); brightness (probability 0.15, range 0.75 to 1.25); "
        "contrast (probability 0.15, range 0.75 to 1.25); low resolution (probability 0.125, range 0.5 to 1); "
        "gamma inverted (probability 0.1); gamma (probability 0.3, range 0.7 to 1.5)",
    }
    given = AugmentationRecipe(mirror_axes=(), right_angles=False, mirror_probability=0.25)
    assert given.describe("flip_rot") == "flip_rot: right angles no; mirror (probability 0.25, axes none)"
    given = AugmentationRecipe(scale_range=(0.5, 0.75))
    assert given.describe("transunet") == words["transunet"].replace("0.9 to 1.1", "0.5 to 0.75")
