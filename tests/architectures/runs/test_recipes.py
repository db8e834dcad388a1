"""Recipes put together from defaults, a file, and the settings of a command; and what older versions called fields."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trifuse.architectures.data.layouts.cohort_options import COHORT_OPTIONS, CohortOptions
from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.runs.decisions import field_names
from trifuse.architectures.runs.recipes import DataRecipe, RecipeError, recipe_from
from trifuse.architectures.runs.registry import experiments
from trifuse.architectures.storage.config_json import config_from_json, config_to_json, dataclass_of
from trifuse.architectures.taff_unet.pretrain import EcgPretrainingRecipe
from trifuse.kernels import DataError


@dataclass(frozen=True)
class Whole:
    data: DataRecipe = field(default_factory=DataRecipe)


def data_of(*settings, file=None, **given):
    return recipe_from(Whole, file, {"data.root": "cohort", **given}, settings).data


def test_fields_by_the_names_of_older_versions(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[data]\nkeep = 'labelled'\n[data.preparation]\nresize = 'cubic'\n")
    data = data_of("data.preparation.restore=labels", "data.image_size=12", file=file, **{"data.nonfinite": "zero"})
    expected = Preprocessing(resize="cubic", restore="labels", image_size=12, nonfinite="zero")
    assert data == DataRecipe("cohort", slices="labelled", preprocessing=expected)


@pytest.mark.parametrize(
    "lines", ["keep = 'foreground'\nslices = 'labelled'", "slices = 'labelled'\nkeep = 'foreground'"]
)
def test_a_file_that_has_both_names_of_a_field_is_refused(tmp_path, lines):
    file = tmp_path / "run.toml"
    file.write_text(f"[data]\n{lines}\n")
    with pytest.raises(RecipeError, match=r"run\.toml: data\.slices: expected one value, got data\.\w+ and data\.\w+$"):
        data_of(file=file)


@pytest.mark.parametrize(
    "settings",
    [
        ("data.slices=all", "data.slices=labelled"),
        ("data.slices=all", "data.slices=all"),
        ("data.image_size=1", "data.preprocessing.image_size=2"),
        ("data.preprocessing.image_size=2", "data.image_size=1"),
    ],
)
def test_a_field_that_is_set_twice_is_refused_by_whatever_name(settings):
    with pytest.raises(RecipeError, match=r"^--set data\.[\w.]+: expected one value, got data\.\S+ and data\.\S+$"):
        data_of(*settings)


def test_a_setting_wins_over_an_option_and_an_option_over_a_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[data]\nsplit_seed = 1\nval_from = 'remaining'\nval_patients = 1")
    data = data_of("data.split_seed=3", file=file, **{"data.split_seed": 2, "data.val_patients": 2})
    assert (data.split_seed, data.val_patients, data.val_from) == (3, 2, "remaining")


def test_a_file_is_named_for_its_own_faults_alone(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[data]\nsplit_seed = 1\nval_patients = 0\n")
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(file))}: recipe: .*val_patients must be at least 1"):
        data_of(file=file)
    with pytest.raises(RecipeError, match=r"^recipe: .*val_patients must be at least 1.* got -1"):
        data_of("data.val_patients=-1", file=file)
    assert data_of("data.val_patients=2", file=file).val_patients == 2


def test_settings_by_old_and_new_names():
    patches = data_of("data.patches.step=1", "data.preprocessing.patches.mirror=false").preprocessing.patches
    assert patches == Patches(step=1.0, mirror=False)


def test_a_run_of_an_older_version():
    """What run.json said before a preprocessing was one thing."""
    old = {
        "root": "cohort",
        "layout": "synapse",
        "targets": [],
        "patient_pattern": None,
        "label_space": "merit9",
        "frames": "both",
        "channel": None,
        "max_interval_days": None,
        "image_size": 32,
        "keep": "foreground",
        "augment": "nnunet",
        "nonfinite": "median",
        "preparation": {
            "intensity": "window",
            "window": [-125.0, 275.0],
            "resize": "linear",
            "channels": 1,
            "restore": "logits",
        },
        "patches": {
            "spacing_mm": [1.0, 2.0],
            "step": 1.0,
            "mirror": True,
            "foreground": 0.5,
            "samples_per_epoch": 8,
        },
    }
    data = config_from_json(DataRecipe, old, "run.json")
    assert data == DataRecipe(
        "cohort",
        layout="synapse",
        label_space="merit9",
        slices="foreground",
        augment="nnunet",
        preprocessing=Preprocessing(
            "window",
            (-125.0, 275.0),
            channels=1,
            image_size=32,
            nonfinite="median",
            patches=Patches((1.0, 2.0), step=1.0, foreground=0.5, samples_per_epoch=8),
        ),
    )
    assert config_from_json(DataRecipe, config_to_json(data), "run.json") == data


def test_every_option_of_a_cohort_is_a_field():
    assert issubclass(DataRecipe, CohortOptions)
    for option in COHORT_OPTIONS:
        value = option.keywords.get("choices", ["3"])[-1]
        given = [value] if option.default == () else option.keywords.get("type", str)(value)
        data = data_of(**{option.field: given})
        assert getattr(data, option.name) == (tuple(given) if option.default == () else given)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.layout=bids", "field 'layout': expected .*got 'bids'"),
        ("data.frames=none", "field 'frames'"),
        ("data.image_size=0", "field 'preprocessing': image_size must be 1 to 65536 pixels, got 0"),
        ("data.image_size=1000000000", "field 'preprocessing': image_size must be 1 to 65536 pixels"),
        ('data.patches={"spacing_mm":[1e-9,1]}', "patches.spacing_mm must be two lengths of 0.001 to 1000 mm"),
        ("data.split_seed=-1", "split_seed must be at least 0, got -1"),
        (f"data.split_seed={2**70}", "field 'split_seed': expected a number that 64 bits hold, got one of 71 bits"),
        ("data.preparation=3", "there is no field 'preprocessing'"),
        ("data.preprocessing.resise=cubic", "did you mean 'resize'"),
        (f"data.split_seed={'9' * 5000}", "field 'split_seed': expected int"),
        (f"data.split_seed={'[' * 5000}", "field 'split_seed': expected int"),
    ],
)
def test_l2_values_that_make_no_sense(setting, message):
    with pytest.raises(RecipeError, match=message):
        data_of(setting)


STRANGE = (math.nan, math.inf, -1, 0, 2**70, -0.5, 1e300, "x", "", [], [1], [math.nan, 1], {}, True, None)
KINDS = [known.load(known.recipe) for known in experiments()] + [EcgPretrainingRecipe]


@given(st.sampled_from([(kind, name) for kind in KINDS for name in field_names(kind)]), st.sampled_from(STRANGE))
@settings(max_examples=150)
def test_l2_property_any_value_of_any_field_makes_a_finite_recipe_or_is_refused_by_name(field, value):
    kind, name = field
    section, _, last = name.rpartition(".")
    try:
        recipe = recipe_from(kind, given={"data.root": "cohort"}, settings=(f"{name}={json.dumps(value)}",))
    except RecipeError as error:
        message = str(error)
    else:
        json.dumps(config_to_json(recipe), allow_nan=False)
        return
    assert last in message or section.rpartition(".")[2] in message


def parts_of(kind: type) -> set[type]:
    """A recipe and the dataclasses that its fields are, or may be."""
    parts = {part for hint in get_type_hints(kind).values() if (part := dataclass_of(hint)) is not None}
    return {kind}.union(*map(parts_of, parts))


@pytest.mark.parametrize("kind", KINDS)
def test_neither_a_recipe_nor_any_part_of_it_can_be_changed(kind):
    """What a run was started with, and what its digests are of, stays what it is."""
    assert [part.__name__ for part in parts_of(kind) if not part.__dataclass_params__.frozen] == []


@pytest.mark.parametrize(
    "text", ["[data]\nroot = " + "[" * 5000, ".".join(["data"] * 3000) + " = 1", "[data]\nroot = 'a"]
)
def test_l3_a_file_that_is_no_recipe(text, tmp_path):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"run\.toml: expected TOML, got"):
        data_of(file=tmp_path / "run.toml")


def test_a_cohort_that_was_moved_is_told_what_to_do(tmp_path):
    with pytest.raises(DataError, match="nothing there; if it was moved since, put it, or a link to it, back"):
        DataRecipe(root=str(tmp_path / "gone")).open()
