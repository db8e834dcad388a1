"""Every sample once per epoch, whoever loads it, and the same ones from the middle of an epoch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import Squares, recipe

from trifuse.architectures.training.batches import Batches, keyed_seed, plan_epoch, steps_per_epoch
from trifuse.architectures.training.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


@settings(deadline=None, max_examples=80)
@given(
    samples=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    accumulate=st.integers(1, 4),
    ranks=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_t12_every_sample_counts_once(samples, batch_size, accumulate, ranks, epoch):
    plan_recipe = recipe(batch_size=batch_size, accumulate=min(accumulate, batch_size))
    plans = [plan_epoch(samples, plan_recipe, epoch, rank, ranks) for rank in range(ranks)]
    alone = plan_epoch(samples, recipe(batch_size=batch_size), epoch, 0, 1)
    assert len(alone) == steps_per_epoch(samples, plan_recipe)
    assert sorted(key[2] for step in alone for key in step[0].keys) == list(range(samples))
    for step, parts in enumerate(zip(*plans, strict=True)):
        assert len({len(part) for part in parts}) == 1, "all ranks take part in every exchange"
        assert all(part[0].is_real for part in parts[:1]), "rank 0, whose running statistics are kept, is never idle"
        counted = [key for number in range(len(parts[0])) for p in parts if p[number].is_real for key in p[number].keys]
        assert counted == list(alone[step][0].keys), "in the order of one rank"
        assert sum(micro_batch.share for micro_batch in parts[0]) == pytest.approx(1)
        assert all(micro_batch.keys for part in parts for micro_batch in part)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return [key[2] for step in plan_epoch(20, recipe(seed=seed), epoch, 0, 1) for key in step[0].keys]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert keyed_seed(1, 23) != keyed_seed(12, 3)
    assert 0 <= keyed_seed("x") < 2**63


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_entered_at_any_step(workers):
    loader = Batches(Squares(10), recipe(batch_size=3, workers=workers), ALONE)
    whole = list(loader.epoch(1))
    rest = list(loader.epoch(1, first_step=2))
    assert len(whole) == 4
    assert len(rest) == 2
    for (early, first), (late, second) in zip(whole[2] + whole[3], rest[0] + rest[1], strict=True):
        assert early == late
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["sample_weight"], torch.ones(len(early.keys)))
    assert [loader.samples_in_step(step) for step in range(4)] == [3, 3, 3, 1]


def test_loading_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    list(Batches(Squares(4), recipe(), ALONE).epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before)
