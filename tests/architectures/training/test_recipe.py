"""A recipe that makes no sense says which field, which value, and what would be allowed."""

from __future__ import annotations

import dataclasses

import pytest

from trifuse.architectures.training.recipe import Recipe

GOOD = {"epochs": 2, "batch_size": 4, "lr": 1e-3}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("epochs", 0, "a whole number >= 1"),
        ("epochs", True, "a whole number >= 1"),
        ("batch_size", 2.0, "a whole number >= 1"),
        ("lr", 0, "a number > 0"),
        ("lr", float("nan"), "a number > 0"),
        ("lr", "1e-3", "a number > 0"),
        ("weight_decay", -1.0, "a number >= 0"),
        ("betas", (0.9, 1.0), r"two numbers in \[0, 1\)"),
        ("betas", [0.9, 0.99], r"two numbers in \[0, 1\)"),
        ("momentum", 1.0, r"a number in \[0, 1\)"),
        ("warmup_epochs", -1, "a number >= 0"),
        ("warmup_epochs", 3, "at most epochs = 2"),
        ("min_lr", float("inf"), "a number >= 0"),
        ("accumulate", 5, "at most batch_size = 4"),
        ("accumulate", 0, "a whole number >= 1"),
        ("ema_decay", 1.0, r"None or a number in \(0, 1\)"),
        ("grad_clip", 0.0, "None or a number > 0"),
        ("best_epoch_by", "dice", "None, 'last', or the column of a score in log.csv, such as 'val_dice'"),
        ("best_epoch_by", 3, "None, 'last', or"),
        ("best_epoch_smoothing", 1.0, r"None or a number in \(0, 1\)"),
        ("best_epoch_smoothing", 0, r"None or a number in \(0, 1\)"),
        ("seed", -1, "a whole number >= 0"),
        ("workers", -1, "a whole number >= 0"),
        ("checkpoint_every_steps", 0, "None or a whole number >= 1"),
        ("device", "tpu", "'auto', 'cpu', 'cuda'"),
        ("device", "cuda:x", "'auto', 'cpu', 'cuda'"),
    ],
)
def test_l2_field_value_and_allowed_are_named(field, value, allowed):
    with pytest.raises(ValueError, match=rf"{field} = .*; allowed: {allowed}"):
        Recipe(**{**GOOD, field: value})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("optimizer", "lion", "'adamw', 'adam', 'sgd'"),
        ("schedule", "step", "'warmup_cosine', 'poly', 'constant'"),
        ("precision", "fp8", "'auto', 'fp32', 'bf16', 'fp16'"),
    ],
)
def test_the_choices_of_a_field_are_named(field, value, allowed):
    with pytest.raises(ValueError, match=f"recipe: {field}: expected one of {allowed}, got '{value}'"):
        Recipe(**{**GOOD, field: value})


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError, match=r"(?s)epochs = 0.*lr = -1.*precision: .*got 'int8'"):
        Recipe(epochs=0, batch_size=1, lr=-1, precision="int8")


def test_defaults_are_allowed_and_frozen():
    recipe = Recipe(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lr = 1.0
    for device in ("auto", "cpu", "cuda", "cuda:1"):
        assert dataclasses.replace(recipe, device=device).device == device
