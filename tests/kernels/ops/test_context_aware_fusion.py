"""What context-aware fusion spares: its three shortcuts against the equations as they are written.

The gate of positions is tested in `test_gates.py`, together with the gate of channels.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from trifuse.kernels import backend
from trifuse.kernels.ops._context_aware_fusion import mean_projection, pooled_projection, recalibrated_sum

# (B, C, H, W): more positions than channels, as many, fewer, one
SHAPES = [(2, 3, 4, 5), (2, 4, 2, 2), (3, 8, 2, 3), (1, 2, 1, 1)]


def random_tensors(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def assert_same(function, definition, arguments, tolerance=1e-12):
    """Compare results and the gradient of each argument."""
    outcomes = []
    for form in (function, definition):
        result = form(*arguments)
        cotangent = random_tensors(result.shape, seed=1)[0].detach()
        outcomes.append([result, *torch.autograd.grad(result, arguments, cotangent)])
    torch.testing.assert_close(*outcomes, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("maximum", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_pooled_projection(name, shape, maximum, projected):
    c = shape[1]

    def definition(first, second, *weights):
        u = torch.cat([first, second], 1)
        for weight in weights:
            u = torch.einsum("ni,bihw->bnhw", weight[:, :, 0, 0], u)
        means = u.mean((2, 3))
        return torch.cat([means, u.amax((2, 3))], 1) if maximum else means

    def function(first, second, weight=None):
        return pooled_projection(first, second, weight, maximum)

    arguments = random_tensors(shape, shape, *([(2 * c, 2 * c, 1, 1)] if projected else []))
    with backend(name):
        assert_same(function, definition, arguments)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recalibrated_sum(name, shape):
    b, c, *_ = shape

    def definition(first, second, weight, scale):
        scaled = scale[:, :, None, None] * torch.cat([first, second], 1)
        return torch.einsum("ni,bihw->bnhw", weight[:, :, 0, 0], scaled)

    with backend(name):
        assert_same(recalibrated_sum, definition, random_tensors(shape, shape, (c, 2 * c, 1, 1), (b, 2 * c)))


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("single", [False, True], ids=["all channels", "one channel"])
def test_mean_projection(name, shape, single):
    weight_shape = (1 if single else shape[1], shape[1], 1, 1)

    def definition(first, second, first_weight, second_weight):
        return (conv2d(first, first_weight) + conv2d(second, second_weight)).mean(1, keepdim=True)

    with backend(name):
        assert_same(mean_projection, definition, random_tensors(shape, shape, weight_shape, weight_shape))


def test_results_have_the_layout_of_the_maps():
    """With one, the same numbers as without; where a map has fewer positions than channels, too."""
    for shape in [(2, 3, 4, 5), (3, 8, 2, 3)]:
        c = shape[1]
        weight, scale, *maps = random_tensors((c, 2 * c, 1, 1), (shape[0], 2 * c), shape, shape)
        expected = recalibrated_sum(*maps, weight, scale)
        assert expected.is_contiguous()
        laid_out = [x.detach().contiguous(memory_format=torch.channels_last) for x in maps]
        result = recalibrated_sum(*laid_out, weight, scale)
        assert result.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_means_of_half_precision_maps_are_taken_in_float32():
    """4096 positions of 1 and one of 4096: a sum in float16 would lose whole positions."""
    x = torch.ones(1, 1, 64, 64, dtype=torch.float16)
    x[..., 0, 0] = 4096
    means = pooled_projection(x, x, None, False)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, torch.full((1, 2), 8191 / 4096))


def test_of_equal_maxima_one_gets_the_gradient():
    x = torch.ones(1, 1, 2, 3, requires_grad=True)
    pooled_projection(x, x.detach(), None, True)[:, 2].sum().backward()
    assert sorted(x.grad.flatten().tolist()) == [0, 0, 0, 0, 0, 1]


def test_neither_the_joined_maps_nor_a_scaled_copy_is_kept():
    """Only the two maps, the projection that the maximum is taken of, and tensors as large as the weights."""
    first, second = random_tensors((2, 4, 16, 16), (2, 4, 16, 16))
    weight, scale, pre = random_tensors((4, 8, 1, 1), (2, 8), (8, 8, 1, 1))
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.numel()), lambda _: None):
        recalibrated_sum(first, second, weight, scale)
        mean_projection(first, second, weight[:, :4], weight[:, 4:])
        pooled_projection(first, second, pre, True)
    large = {pointer for pointer, size in sizes.items() if size >= first.numel()}
    assert large <= {first.data_ptr(), second.data_ptr()}
