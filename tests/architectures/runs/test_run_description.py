"""What a resumed run must not change: every field of its recipe but how it is trained and what changes no result."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from trifuse.architectures.dino_unet.train import DinoUNetRecipe
from trifuse.architectures.runs.nnunet_recipe import nnunet_training
from trifuse.architectures.runs.registry import experiments
from trifuse.architectures.runs.run_description import describe_run, describe_training
from trifuse.architectures.storage.config_json import config_to_json
from trifuse.architectures.training.recipe import Recipe

FREE = {"dino_unet": {"cache_features"}}


@pytest.mark.parametrize("known", experiments(), ids=lambda known: known.name)
def test_a_run_is_described_by_its_whole_recipe_but_its_training(known):
    recipe = known.load(known.recipe)()
    described = describe_run(recipe)
    names = {field.name for field in fields(recipe)} - {"training"} - FREE.get(known.name, set())
    assert described == {name: value for name, value in config_to_json(recipe).items() if name in names}
    assert set(described) == names


def test_where_features_are_kept_changes_no_run():
    recipe = DinoUNetRecipe()
    assert describe_run(replace(recipe, cache_features=True)) == describe_run(recipe)
    assert describe_run(replace(recipe, theta_decay=False)) != describe_run(recipe)


@pytest.mark.parametrize(
    ("training", "optimiser", "schedule"),
    [
        (
            Recipe(50, 32, 5e-5, weight_decay=1e-4, betas=(0.9, 0.95), warmup_epochs=5),
            "adamw, betas 0.9 and 0.95, weight decay 0.0001",
            "warm-up over 5 epochs, then cosine to 0; 50 epochs",
        ),
        (nnunet_training(), "sgd, momentum 0.99, weight decay 3e-05", "polynomial; 1000 epochs"),
        (
            Recipe(3, 2, 1.0, optimizer="adam", schedule="constant"),
            "adam, betas 0.9 and 0.999, weight decay 0",
            "constant; 3 epochs",
        ),
    ],
)
def test_a_training_in_words(training, optimiser, schedule):
    assert describe_training(training) == {
        "Optimiser": optimiser,
        "Learning rate": f"{training.lr:g}",
        "Schedule": schedule,
        "Batch size": str(training.batch_size),
    }
