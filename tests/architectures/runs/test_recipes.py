"""Recipes put together from defaults, a file, and the settings of a command."""

from __future__ import annotations

from dataclasses import dataclass, field

from trifuse.architectures.runs.recipes import DataRecipe, recipe_from


@dataclass(frozen=True)
class Whole:
    data: DataRecipe = field(default_factory=DataRecipe)


def test_fields_by_the_names_of_older_versions(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[data.preparation]\nresize = 'cubic'\n")
    given = {"data.root": "cohort", "data.preparation.channels": 1}
    preprocessing = recipe_from(Whole, file, given, ["data.preparation.restore=labels"]).data.preprocessing
    assert (preprocessing.resize, preprocessing.channels, preprocessing.restore) == ("cubic", 1, "labels")
