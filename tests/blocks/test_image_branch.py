"""The image, brought to a decoder stage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.blocks.image_branch import ImageBranch, resize_bilinear


def convolved(branch: ImageBranch, image: Tensor) -> Tensor:
    x = F.conv2d(image, branch.conv.conv.weight, padding=1)
    return F.relu(F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("size", [(8, 8), (28, 20), (7, 31)])
def test_resize_then_convolve(size):
    image, branch = torch.randn(2, 3, 14, 15), ImageBranch(6)
    resized = F.interpolate(image, size=size, mode="bilinear", antialias=True)
    torch.testing.assert_close(branch(image, size), convolved(branch, resized), atol=1e-5, rtol=1e-5)


def test_convolve_then_resize():
    image, branch = torch.randn(2, 3, 14, 15), ImageBranch(6, conv_then_resize=True)
    expected = F.interpolate(convolved(branch, image), size=(8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(branch(image, (8, 8)), expected, atol=1e-5, rtol=1e-5)


def test_shrinking_averages_and_growing_interpolates():
    checkerboard = (torch.arange(16)[:, None] + torch.arange(16) % 2).remainder(2).float()[None, None]
    shrunk = resize_bilinear(checkerboard, (5, 5))
    assert (shrunk - 0.5).abs().max() < 0.1, "without a low-pass filter a checkerboard aliases"
    grown = resize_bilinear(checkerboard, (32, 32))
    torch.testing.assert_close(grown, F.interpolate(checkerboard, size=(32, 32), mode="bilinear"))
    assert resize_bilinear(checkerboard, (16, 16)) is checkerboard


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype):
    x = torch.randn(1, 2, 12, 12)
    for size in [(5, 5), (20, 20)]:
        resized = resize_bilinear(x.to(dtype), size)
        assert resized.dtype == dtype
        torch.testing.assert_close(resized.float(), resize_bilinear(x, size), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_gradient_reaches_every_parameter(norm):
    branch = ImageBranch(8, in_dim=1, norm=norm)
    branch(torch.randn(2, 1, 14, 14), (8, 8)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in branch.parameters())


def test_initial_weights_follow_the_generator():
    def draw(seed):
        branch = ImageBranch(64)
        branch.reset_parameters(torch.Generator().manual_seed(seed))
        return branch.conv.conv.weight

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert draw(1).std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
