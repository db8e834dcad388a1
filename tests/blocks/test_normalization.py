"""The norms that convolutional blocks choose from."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from trifuse.blocks.normalization import BatchNormOfPresent, make_norm
from trifuse.kernels import ShapeError


@pytest.mark.parametrize(("dim", "groups"), [(256, 8), (32, 8), (24, 4), (12, 2), (8, 2), (6, 1), (5, 1), (1, 1)])
def test_group_norm(dim, groups):
    x = torch.randn(2, dim, 3, 4)
    torch.testing.assert_close(make_norm("group", dim)(x), F.group_norm(x, groups))


def test_batch_and_instance_norm():
    x = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(make_norm("batch", 4)(x), F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(make_norm("instance", 4)(x), F.instance_norm(x))
    assert make_norm("instance", 4).weight.requires_grad


def test_b7_a_single_value_per_channel_is_refused_with_a_remedy():
    with pytest.raises(ShapeError, match=r"more than one value per channel, got shape \(1, 4, 1, 1\).*norm='group'"):
        make_norm("batch", 4)(torch.randn(1, 4, 1, 1))
    with pytest.raises(ShapeError, match=r"per channel and sample, got shape \(2, 4, 1, 1\).*norm='group'"):
        make_norm("instance", 4)(torch.randn(2, 4, 1, 1))


def test_b7_what_is_well_defined_is_not_refused():
    single = torch.randn(1, 4, 1, 1)
    assert make_norm("batch", 4).eval()(single).isfinite().all()
    assert make_norm("batch", 4)(torch.randn(2, 4, 1, 1)).isfinite().all()
    assert make_norm("group", 4)(single).isfinite().all()


def test_unknown_norm():
    with pytest.raises(ValueError, match="norm: expected one of 'batch', 'instance', 'group', got 'layer'"):
        make_norm("layer", 4)


@pytest.mark.parametrize("there", [[True, False, True, True], [False, True, False, False], [True] * 4])
def test_of_a_batch_with_absent_samples_only_the_present_ones_count(there):
    """As if the batch held them alone: values, gradients, running statistics, whatever stands in the others."""
    present = torch.tensor(there)
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    x[~present] = torch.nan
    masked, alone = BatchNormOfPresent(3).double(), torch.nn.BatchNorm2d(3).double()
    outcomes = []
    for norm, given, arguments in ((masked, x.clone(), (present,)), (alone, x[present].clone(), ())):
        torch.nn.init.constant_(norm.bias, 0.5)
        y = norm(given.requires_grad_(), *arguments)
        y.pow(3).sum().backward()
        outcomes.append((y, given.grad, norm.weight.grad, norm.bias.grad, dict(norm.named_buffers())))
    (y, x_grad, *rest), (wanted, wanted_grad, *wanted_rest) = outcomes
    torch.testing.assert_close(y[present], wanted)
    torch.testing.assert_close(x_grad[present], wanted_grad)
    torch.testing.assert_close(rest, wanted_rest)
    assert not y[~present].any()
    assert not x_grad[~present].any()


def test_of_a_batch_of_absent_samples_nothing_is_remembered():
    norm, x = BatchNormOfPresent(3), torch.full((2, 3, 2, 2), torch.nan, requires_grad=True)
    norm(x, torch.zeros(2, dtype=torch.bool)).sum().backward()
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_var, torch.ones(3))
    assert not torch.cat([norm.running_mean, norm.weight.grad, norm.bias.grad, x.grad.flatten()]).any()
