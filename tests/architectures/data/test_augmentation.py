"""Augmentation: image and target move together, by one of the square's eight symmetries."""

from __future__ import annotations

import torch

from trifuse.architectures.data.augmentation import FlipRotate


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
