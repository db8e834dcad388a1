"""Augmentation: image and target move together, as often and as far as they should."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import ndimage

from trifuse.architectures.data.samples.augmentation import FlipRotate, TransUNetAugmentation
from trifuse.kernels import MissingExtra


def outcomes(draws=200):
    target = torch.arange(16).reshape(4, 4)
    image = torch.stack([target.float(), target.float() * 2, target.float() * 3])
    for seed in range(draws):
        yield image, target, *FlipRotate()(image, target, torch.Generator().manual_seed(seed))


def test_image_and_target_move_together():
    for _, _, image, target in outcomes():
        torch.testing.assert_close(image, torch.stack([target.float() * factor for factor in (1, 2, 3)]))
        assert image.is_contiguous()
        assert target.is_contiguous()


def test_all_eight_symmetries_and_no_other():
    plane = torch.arange(16).reshape(4, 4)
    symmetries = {
        tuple(turned.flatten().tolist())
        for turns in range(4)
        for turned in (torch.rot90(plane, turns), torch.rot90(plane, turns).T)
    }
    seen = [tuple(target.flatten().tolist()) for *_, target in outcomes()]
    assert set(seen) == symmetries
    assert len(symmetries) == 8
    assert min(seen.count(symmetry) for symmetry in symmetries) > 200 / 8 / 2


def test_the_generator_alone_decides():
    image, target = torch.rand(3, 4, 4), torch.rand(4, 4)
    torch.manual_seed(0)
    first = FlipRotate()(image, target, torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    again = FlipRotate()(image, target, torch.Generator().manual_seed(5))
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other)


SIDE, DRAWS = 41, 600


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


@dataclass
class Move:
    """Where pixels of a slice came from: source = matrix @ (pixel - centre) + centre + offset, in pixels."""

    matrix: np.ndarray
    offset: np.ndarray
    target: np.ndarray
    source: np.ndarray

    @property
    def turned(self):
        return np.linalg.det(self.matrix) < 0

    @property
    def angle(self):
        return np.degrees(np.arctan2(self.matrix[0, 1], self.matrix[0, 0]))

    @property
    def factor(self):
        return abs(np.linalg.det(self.matrix)) ** -0.5

    @property
    def shift(self):
        return np.linalg.solve(self.matrix, -self.offset)


@pytest.fixture(scope="module")
def moves():
    """Augment the coordinates themselves: linear interpolation is exact for them, so that a fit recovers the move."""
    coordinates = np.stack(np.meshgrid(*[np.arange(SIDE, dtype=np.float64)] * 2, indexing="ij"))
    middle = (slice(None), slice(14, 27), slice(14, 27))
    design = np.stack([*(coordinates[middle] - 20).reshape(2, -1), np.ones(13 * 13)], axis=1)
    image, target = torch.from_numpy(coordinates), torch.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    found = []
    for seed in range(DRAWS):
        moved, labels = TransUNetAugmentation(rotate_image_order=1)(image, target, generator_of(seed))
        fit = np.linalg.lstsq(design, moved.numpy()[middle].reshape(2, -1).T - 20, rcond=None)[0]
        found.append(Move(fit[:2].T, fit[2], labels.numpy(), moved.numpy()))
    return found


def about(share, seen):
    """Allow four standard deviations of the count."""
    return abs(sum(seen) - share * len(seen)) < 4 * (share * (1 - share) * len(seen)) ** 0.5


def test_every_move_is_as_frequent_as_it_should_be(moves):
    assert about(1 / 2, [move.turned for move in moves])
    upright = [move for move in moves if not move.turned]
    assert about(1 / 2 * 39 / 40, [abs(move.angle) > 1e-3 for move in upright])  # one angle of forty is 0
    assert about(1 / 2, [abs(move.factor - 1) > 1e-6 for move in moves])
    assert about(1 / 2, [np.abs(move.shift).max() > 1e-6 for move in moves])
    assert about(1 / 4, [np.abs(move.shift).max() > 1e-6 and abs(move.factor - 1) > 1e-6 for move in moves])


def test_turns_are_right_angles_mirrored(moves):
    turns = [tuple(np.round(move.matrix * move.factor).astype(int).flatten()) for move in moves if move.turned]
    assert len(set(turns)) == 4
    assert all(about(1 / 4, [turn == one for turn in turns]) for one in set(turns))
    assert all(sorted(map(abs, turn)) == [0, 0, 1, 1] for turn in turns)


def test_angles_are_whole_degrees_from_minus_20_to_19(moves):
    angles = {round(move.angle, 3) for move in moves if not move.turned}
    assert angles <= set(range(-20, 20))
    assert min(angles) == -20
    assert max(angles) == 19


def test_scale_and_shift_stay_in_their_ranges(moves):
    factors = [move.factor for move in moves]
    shifts = np.stack([move.shift for move in moves])
    assert 0.9 <= min(factors) < 0.91
    assert 1.09 < max(factors) <= 1.1
    np.testing.assert_array_less(np.abs(shifts), 0.1 * SIDE + 1e-9)
    assert shifts.max(axis=0).min() > 0.09 * SIDE
    assert shifts.min(axis=0).max() < -0.09 * SIDE


def test_target_takes_the_pixel_that_the_image_takes(moves):
    """To about a pixel: the nearest in a plane that is scaled, and from there the nearest in one that is rotated."""
    for move in moves:
        rows, columns = np.divmod(move.target[13:28, 13:28], SIDE)
        source = move.source[:, 13:28, 13:28]
        assert np.abs(np.stack([rows, columns]) - source).max() <= 0.5 + 0.5 * 2**0.5 + 1e-6


@pytest.mark.parametrize("order", [0, 1, 3])
def test_rotation_is_scipy_s(order):
    rng = np.random.default_rng(0)
    image, target = rng.random((2, 24, 24)), rng.integers(0, 9, (24, 24))
    options = {"reshape": False, "axes": (-2, -1)}
    rotated = 0
    for seed in range(60):
        moved, labels = TransUNetAugmentation(rotate_image_order=order)(
            torch.from_numpy(image), torch.from_numpy(target), generator_of(seed)
        )
        for angle in {*range(-20, 20)} - {0}:
            want = [ndimage.rotate(plane, angle, order=order, cval=plane.min(), **options) for plane in image]
            if np.allclose(moved, want, rtol=0, atol=1e-12):
                rotated += 1
                assert np.array_equal(labels, ndimage.rotate(target, angle, order=0, **options))
    assert rotated >= 2


def test_no_new_label_values_and_darkness_outside():
    labels = torch.tensor([3, 7]).repeat_interleave(8).repeat(16, 1)
    image = labels[None].float() - 5
    for seed in range(100):
        moved, target = TransUNetAugmentation()(image, labels, generator_of(seed))
        assert set(target.unique().tolist()) <= {0, 3, 7}
        assert target.dtype == torch.int64
        assert moved.dtype == torch.float32
        assert moved.min() == -2
        assert (moved[0][target == 0] < 2).all()
        assert moved.is_contiguous()
        assert target.is_contiguous()


def test_by_default_an_image_is_rotated_like_its_target():
    target = torch.arange(400).reshape(20, 20)
    draws = (TransUNetAugmentation()(target[None].double(), target, generator_of(seed)) for seed in range(200))
    assert about(
        1 / 4, [torch.equal(image[0], labels.double()) for image, labels in draws]
    )  # neither scaled nor shifted


def test_the_generator_alone_decides_here_too():
    image, target = torch.rand(1, 16, 16), torch.randint(9, (16, 16))
    for seed in range(20):
        pairs = []
        for state in (0, 1):
            torch.manual_seed(state)
            np.random.seed(state)
            pairs.append(TransUNetAugmentation()(image, target, generator_of(seed)))
        for one, other in zip(*pairs, strict=True):
            assert torch.equal(one, other)


def test_without_scipy_it_is_refused_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtra, match=r"trifuse\[med\]"):
        TransUNetAugmentation()
