"""What a resumed run must not change: every field of its recipe but how it is trained and what changes no result."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from trifuse.architectures.dino_unet.train import DinoUNetRecipe
from trifuse.architectures.runs.registry import experiments
from trifuse.architectures.runs.run_description import describe_run
from trifuse.architectures.storage.config_json import config_to_json

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
