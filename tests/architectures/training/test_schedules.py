"""Schedules at their ends, and group by group."""

from __future__ import annotations

import itertools
import math

import pytest

from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.schedules import constant, learning_rate, poly, warmup_cosine


def test_poly():
    assert poly(0, 100, 0.01) == 0.01
    assert poly(50, 100, 0.01) == pytest.approx(0.01 * 0.5**0.9)
    assert poly(99, 100, 0.01) == pytest.approx(0.01 * 0.01**0.9)
    assert poly(100, 100, 0.01) == 0


def test_warmup_cosine():
    rates = [warmup_cosine(step, 100, 10, 1.0, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert warmup_cosine(0, 10, 0, 1.0) == 1.0
    assert warmup_cosine(9, 10, 10, 1.0) == 1.0  # warm-up only
    assert warmup_cosine(0, 1, 0, 1.0) == 1.0


def test_constant():
    assert constant(0.3) == 0.3


def test_poly_moves_with_epochs_and_cosine_with_steps():
    recipe = Recipe(epochs=4, batch_size=1, lr=0.1, warmup_epochs=0.5, min_lr=0.01)

    def rates(schedule, lr=0.1):
        return [learning_rate(schedule, recipe, lr=lr, step=s, steps_per_epoch=4) for s in range(16)]

    assert rates("poly") == [poly(step // 4, 4, 0.1) for step in range(16)]
    assert rates("warmup_cosine") == [warmup_cosine(step, 16, 2, 0.1, 0.01) for step in range(16)]
    assert rates("constant") == [0.1] * 16
    doubled = rates("warmup_cosine", lr=0.2)
    assert all(math.isclose(2 * one, two) for one, two in zip(rates("warmup_cosine"), doubled, strict=True))
