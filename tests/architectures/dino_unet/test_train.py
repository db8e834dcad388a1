"""The recipe of DINO-UNet: the weights of its loss are fields."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_networks import NETWORKS

from trifuse.architectures.dino_unet.train import DinoUNetRecipe, fit_options, parameter_groups
from trifuse.architectures.runs.recipes import RecipeError, recipe_from
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.architectures.training.parameter_groups import make_groups
from trifuse.architectures.training.recipe import Recipe


def recipe_with(*settings: str) -> DinoUNetRecipe:
    return recipe_from(DinoUNetRecipe, given={"data.root": "cohort"}, settings=settings)


def test_defaults_are_the_papers():
    paper = Recipe(epochs=50, batch_size=32, lr=5e-5, weight_decay=1e-4, betas=(0.9, 0.95), warmup_epochs=5)
    assert DinoUNetRecipe().training == paper


def test_the_weights_of_the_loss_are_fields():
    data = SimpleNamespace(train_set=[], val_set=[0], cohort=SimpleNamespace(class_names=("background", "atrium")))
    recipe = recipe_with("batch_dice=false", "lambda_dice=2", "lambda_ce=0.5")
    assert fit_options(None, recipe, data, Path())["loss"] == SegmentationLoss(batch_dice=False, w_dice=2.0, w_ce=0.5)
    assert fit_options(None, recipe_with(), data, Path())["loss"] == SegmentationLoss()


@pytest.mark.parametrize(
    ("settings", "decay", "times"),
    [((), 1e-4, 1.0), (("theta_decay=false",), 0.0, 1.0), (("theta_lr_mult=3",), 1e-4, 3.0)],
)
def test_block_logits_decay_and_learn_as_the_recipe_says(settings, decay, times):
    recipe = recipe_with(*settings)
    decoder, theta = make_groups(NETWORKS["dino_unet"].make(), recipe.training, lambda m: parameter_groups(m, recipe))
    assert [group.optimizer.defaults["weight_decay"] for group in (decoder, theta)] == [1e-4, decay]
    assert [group.lr for group in (decoder, theta)] == pytest.approx([5e-5, 5e-5 * times])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lambda_ce=-1"], r"lambda_ce must be a finite number, and not negative, got -1\.0"),
        (["lambda_dice=0", "lambda_ce=0"], "lambda_dice and lambda_ce must not all be 0: there would be nothing"),
    ],
)
def test_weights_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        recipe_with(*settings)
