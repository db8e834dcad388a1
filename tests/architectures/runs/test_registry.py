"""The experiments: what they refer to is there, what they say is true, and reading them loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import get_type_hints

import pytest

from trifuse.architectures.cli.train import CASES, TRAINING
from trifuse.architectures.runs.experiment import Experiment
from trifuse.architectures.runs.options import RecipeOption
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.runs.registry import NETWORKS, experiment, experiment_of, experiments
from trifuse.architectures.storage.config_json import dataclass_of
from trifuse.architectures.storage.pretrained import Pretrained
from trifuse.architectures.taff_unet.variants import SETTINGS

REFERENCES = (
    "network",
    "recipe",
    "fit",
    "title",
    "report",
    "paper",
    "protocol",
    "paper_tables",
    "decisions",
    "defaults",
    "check",
)
INPUTS = ("mechanisms", "training_inputs", "prediction_inputs", "run_inputs", "input_shapes", "phantom")
every_network = pytest.mark.parametrize("known", experiments(), ids=lambda known: known.name)


def options_of(known: Experiment) -> list[RecipeOption]:
    return [option for group in (CASES, TRAINING, *known.options) for option in group.options]


@every_network
def test_references_lead_somewhere(known):
    for name in (*REFERENCES, *INPUTS):
        reference = getattr(known, name)
        assert reference == "" or known.load(reference) is not None, name
    for offer in (known.demo, known.ablation, *known.converters, *known.pretrainings):
        assert offer is None or callable(known.load(offer.run))
    assert known.quick is None or callable(known.load(known.quick.cohort, default=print))
    assert known.load("", default=7) == 7


@every_network
def test_a_network_is_called_the_same_everywhere(known):
    network, recipe = known.load(known.network), known.load(known.recipe)()
    assert issubclass(network, Pretrained)
    assert network.architecture == known.name
    assert isinstance(recipe.network, network.config_type)
    assert isinstance(recipe.data, DataRecipe)
    assert experiment(known.name) is known
    assert experiment_of(recipe) is known


def test_the_recipe_of_no_network_is_refused():
    with pytest.raises(TypeError, match=f"expected that of one of {', '.join(NETWORKS)}, got a DataRecipe"):
        experiment_of(DataRecipe())
    with pytest.raises(KeyError, match="unet9000"):
        experiment("unet9000")


@every_network
def test_the_help_says_what_the_recipe_does(known):
    said, recipe = dict(known.shown_defaults), known.load(known.recipe)()
    if known.variants:
        assert said.pop("variant").endswith(f"else {recipe.network.variant}")
    expected = {"image_size": recipe.data.preprocessing.image_size, "augment": recipe.data.augment}
    expected |= {name: getattr(recipe.training, name) for name in ("epochs", "batch_size", "lr", "seed")}
    if said:  # a network may leave the help without them
        assert {name: text.split(",")[0] for name, text in said.items()} == {n: str(one) for n, one in expected.items()}


@every_network
def test_variants_are_those_of_the_network(known):
    tables = vars(import_module(f"{known.package}.variants")) if known.variants else {}
    assert known.variants == tuple(name for table in tables if table.endswith("VARIANTS") for name in tables[table])
    for variant in known.variants:
        assert known.load(known.network).config_type(variant=variant).variant == variant


def test_settings_are_those_of_the_network():
    (setting,) = (option for option in options_of(experiment("taff_unet")) if option.name == "setting")
    assert setting.keywords["choices"] == tuple(SETTINGS)


@every_network
def test_options_set_fields_that_are_there(known):
    named = [path for option in options_of(known) for path in (option.field, *option.sets)]
    trainings = [(known.recipe, named)]
    for part in known.pretrainings:
        options = [*part.sources, *part.options, *(option for group in part.groups for option in group.options)]
        trainings.append((part.recipe, [path for option in options for path in (option.field, *option.sets)]))
    for recipe, paths in trainings:
        for path in paths:
            kind = known.load(recipe)
            *sections, name = path.split(".")
            for section in sections:
                kind = dataclass_of(get_type_hints(kind)[section])
            assert name in {field.name for field in fields(kind)}, path
            assert not is_dataclass(get_type_hints(kind)[name]), path


def test_reading_the_experiments_loads_nothing_heavy():
    script = (
        "import sys\n"
        "from trifuse.architectures.runs.registry import experiments\n"
        "assert [known.name for known in experiments()]\n"
        "assert not {'torch', 'numpy', 'einops'} & {*sys.modules}"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("name", NETWORKS)
def test_public_names_come_when_they_are_used(name):
    package = import_module(f"trifuse.architectures.{name}")
    assert "EXPERIMENT" in package.__all__
    for public in package.__all__:
        assert getattr(package, public) is not None
    assert dir(package) == sorted(package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Unet9000'"):
        package.Unet9000  # noqa: B018
