"""nnU-Net's augmentation: what moves together, what is never touched, and each change of values by its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from trifuse.architectures.data.samples import nnunet_augmentation
from trifuse.architectures.data.samples.nnunet_augmentation import NnUNetAugmentation

P = 24
SPATIAL = ("rotation", "scale", "mirror")
VALUES = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma")


def only(*names, probability=1.0, **options):
    """Return an augmentation of these effects alone, each with that probability."""
    never = {f"{name}_probability": 0.0 for name in (*SPATIAL, *VALUES)}
    return NnUNetAugmentation(**{**never, **{f"{name}_probability": probability for name in names}, **options})


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def square(side, seed=0):
    """Return an image, labels and segments of that side, without structure."""
    generator = generator_of(seed)
    image = torch.randn(1, side, side, generator=generator)
    labels = torch.randint(4, (side, side), generator=generator)
    segments = torch.randint(18, (side, side), generator=generator).to(torch.uint8)
    return image, labels, segments


def augmented(augment, seed=0, patch_size=P, given=None):
    given = square(augment.source_size(patch_size)) if given is None else given
    return augment(*given, generator_of(seed), patch_size)[:3]


def middle(plane, side=P):
    margin = (plane.shape[-1] - side) // 2
    return plane[..., margin : margin + side, margin : margin + side]


def test_defaults_are_those_of_nnunet():
    default = NnUNetAugmentation()
    assert (default.rotation_probability, default.rotation_degrees) == (0.2, 180)
    assert (default.scale_probability, default.scale_range) == (0.2, (0.7, 1.4))
    assert (default.noise_probability, default.noise_variance) == (0.1, (0, 0.1))
    assert (default.blur_probability, default.blur_sigma_px) == (0.1, (0.5, 1))  # 0.2 of images, half of their channels
    assert (default.brightness_probability, default.brightness_range) == (0.15, (0.75, 1.25))
    assert (default.contrast_probability, default.contrast_range) == (0.15, (0.75, 1.25))
    assert default.low_resolution_probability == 0.125  # 0.25 of images, half of their channels
    assert default.low_resolution_range == (0.5, 1)
    assert (default.gamma_inverted_probability, default.gamma_probability) == (0.1, 0.3)
    assert default.gamma_range == (0.7, 1.5)
    assert (default.mirror_probability, default.mirror_axes) == (0.5, (0, 1))


# ---------------------------------------------------------------------------------------- what is never touched


@given(st.integers(0, 2**40), st.integers(3, 30))
def test_changes_of_values_leave_labels_and_prior_alone(seed, patch_size):
    given_square = square(patch_size + 4, seed)
    image, labels, segments = augmented(only(*VALUES), seed, patch_size, given_square)
    assert not torch.equal(image, middle(given_square[0], patch_size))
    assert image.isfinite().all()
    assert torch.equal(labels, middle(given_square[1], patch_size))
    assert torch.equal(segments, middle(given_square[2], patch_size))


@given(st.integers(0, 2**40))
def test_labels_and_prior_stay_what_they_are_made_of(seed):
    """Nearest pixels: no value between two, and the two planes move alike, type and all."""
    image, labels, _ = square(NnUNetAugmentation().source_size(P), seed)
    labels = labels * 5  # 0, 5, 10, 15
    same = labels.to(torch.uint8)
    _, moved, moved_same = augmented(only(*SPATIAL), seed, P, (image, labels, same))
    assert set(moved.unique().tolist()) <= {0, 5, 10, 15}
    assert (moved.dtype, moved_same.dtype) == (torch.int64, torch.uint8)
    assert torch.equal(moved, moved_same.long())


def test_the_generator_alone_decides():
    augment = NnUNetAugmentation()
    results = []
    for state in (0, 1):
        torch.manual_seed(state)
        results.append([augmented(augment, seed) for seed in range(30)])
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len({image.numpy().tobytes() for image, _, _ in results[0]}) > 20


def test_without_a_prior_and_without_changing_what_is_given():
    image, labels, segments = square(NnUNetAugmentation().source_size(P))
    before = image.clone(), labels.clone()
    for seed in range(20):
        with_prior = augmented(NnUNetAugmentation(), seed, P, (image, labels, segments))
        moved, target, prior = augmented(NnUNetAugmentation(), seed, P, (image, labels, None))
        assert prior is None
        assert torch.equal(moved, with_prior[0])
        assert torch.equal(target, with_prior[1])
    assert torch.equal(image, before[0])
    assert torch.equal(labels, before[1])


# ------------------------------------------------------------------------------------------------ moving


def test_image_and_labels_move_together():
    augment = only(*SPATIAL)
    side = augment.source_size(48)
    rows, columns = torch.meshgrid(torch.arange(side) - 40.0, torch.arange(side) - 45.0, indexing="ij")
    ellipse = ((rows / 12) ** 2 + (columns / 20) ** 2 < 1).long()
    for seed in range(20):
        image, labels, prior = augmented(augment, seed, 48, (ellipse[None].float(), ellipse, ellipse.byte()))
        assert ((image[0] > 0.5) == labels.bool()).float().mean() > 0.99
        assert torch.equal(prior.long(), labels)


@pytest.fixture
def angle(monkeypatch):
    """Return a function that lets every angle be drawn as the one that it is given, and else what is lowest."""

    def draw(degrees):
        fixed = lambda self, limits: degrees if limits[0] < 0 else limits[0]  # noqa: E731
        monkeypatch.setattr(nnunet_augmentation._Draws, "between", fixed)

    return draw


@pytest.mark.parametrize(("degrees", "turns"), [(90.0, 3), (180.0, 2), (-90.0, 1)])
def test_right_angles_are_exact(degrees, turns, angle):
    angle(degrees)
    augment = only("rotation")
    given_square = square(augment.source_size(P))
    image, labels, segments = augmented(augment, given=given_square)
    for got, source in zip((image, labels, segments), given_square, strict=True):
        torch.testing.assert_close(got, torch.rot90(middle(source), turns, (-2, -1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("factor", [0.7, 1.0001, 1.4])
def test_a_factor_above_one_makes_things_grow(factor):
    augment = only("scale", scale_range=(factor, factor))
    side = augment.source_size(64)
    distance = torch.arange(side) - (side - 1) / 2
    disc = (distance[:, None] ** 2 + distance**2 < 20**2).long()
    image, labels, _ = augmented(augment, 0, 64, (disc[None].float(), disc, None))
    assert labels.sum().item() == pytest.approx(disc.sum().item() * factor**2, rel=0.02)
    assert image.sum().item() == pytest.approx(disc.sum().item() * factor**2, rel=0.02)


def test_nothing_comes_in_from_outside(angle):
    """The square is as large as the widest turn and the smallest scale need, and no larger where there are none."""
    ones = lambda augment: torch.ones(1, augment.source_size(P), augment.source_size(P))  # noqa: E731
    for degrees in (0.0, 30.0, 45.0):
        angle(degrees)
        augment = only("rotation", "scale", scale_range=(0.7, 0.7))
        image, labels, _ = augmented(augment, given=(ones(augment), ones(augment)[0].long(), None))
        assert (image > 0.99).all()
        assert labels.all()
    assert only(*VALUES, "mirror").source_size(P) == P
    assert only("rotation").source_size(P) < only("scale", "rotation").source_size(P)
    assert {augment.source_size(side) % 2 == side % 2 for side in range(1, 40)} == {True}


def test_mirrorings_are_all_as_likely():
    image, labels, segments = square(P)
    augment = only("mirror", probability=0.5)
    wanted = {image.flip(axes).numpy().tobytes(): axes for axes in ((), (-1,), (-2,), (-2, -1))}
    found = []
    for seed in range(400):
        mirrored, target, prior = augmented(augment, seed, P, (image, labels, segments))
        found.append(wanted[mirrored.numpy().tobytes()])
        assert torch.equal(target, labels.flip(found[-1]))
        assert torch.equal(prior, segments.flip(found[-1]))
    for axes in wanted.values():
        assert abs(found.count(axes) - 100) < 3.5 * np.sqrt(400 * 0.25 * 0.75)


def positions(side):
    """Return the coordinates of pixels from -1 to 1 over a patch of P pixels, in the middle of a square: (side,)."""
    return (torch.arange(side) - (side - 1) / 2) * 2 / P


@pytest.mark.parametrize("names", [(), ("mirror",), ("rotation",), ("scale",), SPATIAL], ids=str)
def test_it_says_where_everything_lay_before(names):
    """Images whose values are their own x and y tell it as well."""
    augment = only(*names, probability=0.6)
    side = augment.source_size(P)
    labels = torch.zeros(side, side, dtype=torch.long)
    planes = torch.meshgrid(positions(side), positions(side), indexing="xy")
    rows = torch.meshgrid(positions(P), positions(P), indexing="xy")
    here = torch.stack([*rows, torch.ones(P, P)], dim=-1)
    seen = set()
    for seed in range(25):
        found = [augment(plane[None], labels, None, generator_of(seed), P) for plane in planes]
        transform = found[0][3]
        assert tuple(transform.shape) == (2, 3)
        before = here @ transform.T
        for axis, (image, _, _, _) in enumerate(found):
            torch.testing.assert_close(image[0], before[..., axis], rtol=1e-4, atol=1e-4)
        seen.add(tuple(transform.flatten().tolist()))
    assert len(seen) > 3 or not names


# ---------------------------------------------------------------------------------------------- changing values


@pytest.mark.parametrize("name", [*VALUES, "rotation", "scale"])
def test_each_change_comes_as_often_as_asked(name):
    augment = only(name, probability=0.3)
    given_square = square(augment.source_size(9))
    plain = middle(given_square[0], 9)
    changed = sum(not torch.equal(augmented(augment, seed, 9, given_square)[0], plain) for seed in range(400))
    assert abs(changed - 120) < 3.5 * np.sqrt(400 * 0.3 * 0.7)


def values(name, patch_size=P, seed=0, **options):
    """Return the image before and after one change."""
    augment = only(name, **options)
    given_square = square(augment.source_size(patch_size), seed)
    return given_square[0], augmented(augment, seed, patch_size, given_square)[0]


def test_noise_has_the_variance():
    before, after = values("noise", 96, noise_variance=(0.09, 0.09))
    assert (after - before).std().item() == pytest.approx(0.3, rel=0.03)
    assert abs((after - before).mean().item()) < 0.02


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_blur_is_gaussian(sigma):
    before, after = values("blur", blur_sigma_px=(sigma, sigma))
    np.testing.assert_allclose(after[0], ndimage.gaussian_filter(before[0].numpy(), sigma, mode="mirror"), atol=1e-4)


def test_brightness_is_a_factor():
    before, after = values("brightness", brightness_range=(1.2, 1.2))
    torch.testing.assert_close(after, before * 1.2)


def test_contrast_moves_values_from_their_mean_but_not_out_of_their_range():
    before, after = values("contrast", contrast_range=(1.25, 1.25))
    wanted = (1.25 * (before - before.mean()) + before.mean()).clamp(before.min(), before.max())
    torch.testing.assert_close(after, wanted)
    assert after.max() == before.max()
    before, after = values("contrast", contrast_range=(0.75, 0.75))
    assert after.std().item() == pytest.approx(0.75 * before.std().item(), rel=1e-4)


def test_low_resolution_keeps_a_part_of_the_pixels():
    before, after = values("low_resolution", low_resolution_range=(0.5, 0.5))
    few = before[:, 1::2, 1::2]  # the nearest of two is the second
    torch.testing.assert_close(
        after, torch.nn.functional.interpolate(few[None], size=P, mode="bicubic", align_corners=False)[0]
    )
    before, after = values("low_resolution", low_resolution_range=(1.0, 1.0))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("name", ["gamma", "gamma_inverted"])
def test_gamma_bends_values_and_keeps_mean_and_deviation(name):
    before, after = values(name, gamma_range=(1.5, 1.5))
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-4)
    assert after.std().item() == pytest.approx(before.std().item(), rel=1e-4)
    order = before.flatten().argsort()
    rising = after.flatten()[order].diff()
    assert (rising >= -1e-5).all()
    dark, bright = rising[:50].mean(), rising[-50:].mean()
    gained = before.flatten()[order].diff()
    ratio = (dark / gained[:50].mean()) / (bright / gained[-50:].mean())
    assert ratio < 0.8 if name == "gamma" else ratio > 1.25  # powers above one press dark values together


def test_factors_fall_below_one_as_often_as_above():
    grew = sum(
        float((values("brightness", 4, seed)[1] / values("brightness", 4, seed)[0]).mean()) > 1 for seed in range(200)
    )
    assert abs(grew - 100) < 3.5 * np.sqrt(50)


def test_an_image_without_contrast():
    flat = torch.full((1, P, P), 2.0)
    labels = torch.zeros(P, P, dtype=torch.long)
    for name in ("gamma", "gamma_inverted", "contrast", "low_resolution", "blur"):
        image, _, _ = augmented(only(name), given=(flat, labels, None))
        torch.testing.assert_close(image, flat)
