"""The moving average: what is averaged, how fast it moves, and that the network gets its own weights back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trifuse.architectures.training.ema import WeightAverage, evaluation_mode


def network() -> nn.Sequential:
    """A frozen layer, one that is trained, and a batch norm: statistics of its own, and a count of batches."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].requires_grad_(False)
    return model


def test_statistics_of_batch_norm_are_averaged_with_the_weights_and_nothing_that_stays():
    model = network()
    average = WeightAverage(model, 0.5)
    assert {*average.shadow} == {
        *("1.weight", "1.bias", "2.weight", "2.bias"),
        *("2.running_mean", "2.running_var"),
    }
    torch.manual_seed(0)
    model[2](torch.randn(8, 3) * 2 + 5)  # moves the statistics, as a step of training does
    average.set_step(100)
    average.update()
    live = model[2].running_mean.clone()
    assert live.abs().min() > 0.1
    with evaluation_mode(model, average):
        torch.testing.assert_close(model[2].running_mean, live / 2)  # between 0, where it began, and now
    assert torch.equal(model[2].running_mean, live)


@pytest.mark.parametrize(("steps", "moved"), [(1, 1 - 2 / 11), (8, 0.5), (10_000, 0.1)])
def test_a_short_run_is_not_dominated_by_where_it_began(steps, moved):
    model = network()
    average, start = WeightAverage(model, 0.9), model[1].weight.detach().clone()
    with torch.no_grad():
        model[1].weight.add_(1.0)
    average.set_step(steps)
    average.update()
    torch.testing.assert_close(average.shadow["1.weight"], start + moved)
