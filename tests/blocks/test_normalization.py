"""The norms that convolutional blocks choose from."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trifuse.blocks.normalization import BatchNormOfPresent, RunningNorm, make_norm
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


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("there", [[True, False, True, True], [False, True, False, False], [True] * 4])
def test_of_a_batch_with_absent_samples_only_the_present_ones_count(there, momentum):
    """As if the batch held them alone: values, gradients, running statistics, whatever stands in the others."""
    present = torch.tensor(there)
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    x[~present] = torch.nan
    masked, alone = (kind(3, momentum=momentum).double() for kind in (BatchNormOfPresent, torch.nn.BatchNorm2d))
    outcomes = []
    for norm, given, arguments in ((masked, x.clone(), (present,)), (alone, x[present].clone(), ())):
        torch.nn.init.constant_(norm.bias, 0.5)
        norm(3 * given + 1, *arguments)
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


# -------------------------------------------------------------------------------------------------- running norm


def vectors(batches, batch=1, dim=6):
    """Batches of vectors whose numbers have means and deviations of their own."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(batches, batch, dim, generator=generator, dtype=torch.float64)
    return drawn * torch.linspace(0.1, 3, dim) + torch.linspace(-5, 5, dim)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_running_norm_takes_away_what_is_the_same_for_every_image(batch):
    """Over as many batches as weigh alike its statistics are those of all images, whatever a batch holds."""
    norm, seen = RunningNorm(6).double(), vectors(20, batch)
    for x in seen:
        norm(x)
    every = seen.flatten(0, 1)
    torch.testing.assert_close(norm.running_mean, every.mean(0))
    torch.testing.assert_close(norm.running_var, every.var(0, correction=0))
    y = norm.eval()(every)
    torch.testing.assert_close(y.mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.var(0, correction=0) * 6, torch.ones(6, dtype=torch.float64), atol=2e-3, rtol=0)
    assert y.norm(dim=1).mean() == pytest.approx(1, abs=0.15)


def test_a_running_norm_forgets_slowly_and_adds_up_exactly():
    """From the 20th batch on each has a share of 0.05."""
    norm, seen = RunningNorm(6).double(), vectors(60, 3)
    for x in seen:
        norm(x)
    shares = torch.tensor([1 / 20 * 0.95 ** (60 - max(n, 20)) for n in range(1, 61)], dtype=torch.float64)
    assert shares.sum() == pytest.approx(1)
    mean = (shares[:, None] * seen.mean(1)).sum(0)
    torch.testing.assert_close(norm.running_mean, mean)
    variance = (shares[:, None] * (seen - mean).square().mean(1)).sum(0)
    torch.testing.assert_close(norm.running_var, variance)


def test_a_running_norm_gives_one_image_no_more_than_its_share():
    """Not even one that is a million times as large as all before: it is in the statistics by which it is divided."""
    norm = RunningNorm(6).double()
    for x in vectors(50):
        norm(x)
    assert norm(vectors(1)[0] * 1e6).abs().max() * 6**0.5 < 5


def test_a_running_norm_in_evaluation_learns_nothing():
    norm = RunningNorm(6)
    norm(vectors(1)[0].float())
    state = {name: value.clone() for name, value in norm.named_buffers()}
    norm.eval()(vectors(2)[1].float())
    assert all(torch.equal(value, state[name]) for name, value in norm.named_buffers())
    norm.reset_statistics()
    assert all(torch.equal(value, fresh) for value, fresh in zip(norm.buffers(), RunningNorm(6).buffers(), strict=True))


def test_a_running_norm_counts_a_pass_that_checkpointing_repeats_once():
    norm = RunningNorm(6).double()
    x = vectors(1, 4)[0].requires_grad_()
    checkpoint(norm, x, use_reentrant=False).square().sum().backward()
    assert int(norm.num_batches_tracked) == 1
    alone = RunningNorm(6).double()
    (gradient,) = torch.autograd.grad(alone(x).square().sum(), x)
    torch.testing.assert_close(x.grad, gradient)
    torch.testing.assert_close(gradient, 2 * (x - alone.running_mean) / (alone.running_var + 1e-5) / 6)
