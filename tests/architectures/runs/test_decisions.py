"""The tables of what papers say and what is decided: no field of a recipe is left out, runs show their own values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Literal, get_type_hints

import pytest
from decision_rows import decision_rows

from trifuse.architectures.data.layouts.split import Split
from trifuse.architectures.runs.decisions import (
    HEADING,
    NOT_SAID,
    Decision,
    decision_parts,
    decision_table,
    field_names,
    field_value,
    shown,
    undecided_fields,
)
from trifuse.architectures.runs.recipes import RecipeError, recipe_from
from trifuse.architectures.runs.registry import experiment, experiments
from trifuse.architectures.storage.config_json import dataclass_of
from trifuse.kernels.choices import choices_of

every_network = pytest.mark.parametrize(
    "known", [known for known in experiments() if known.decisions], ids=lambda known: known.name
)
ROWS_TO_CHANGE = {"dino_unet": 30, "fias": 35, "plain_unet": 20, "taff_unet": 40}


def decisions_of(known) -> tuple[Decision, ...]:
    return known.load(known.decisions)


def no_row_of(known) -> dict[str, str]:
    return import_module(f"{known.package}.decisions").NO_ROW


def recipe_of(name: str, *settings: str) -> Any:
    known = experiment(name)
    return recipe_from(known.load(known.recipe), given={"data.root": "cohort"}, settings=settings)


def rows(name: str, *settings: str, data: Any = None) -> dict[str, list[str]]:
    """The cells of each question in the table of a recipe: paper, answer, what it differs from, option."""
    return decision_rows(decision_table(decisions_of(experiment(name)), recipe_of(name, *settings), data))


# --------------------------------------------------------------------------------------------------- nothing left out


@pytest.mark.parametrize("known", experiments(), ids=lambda known: known.name)
def test_a_network_with_a_paper_says_what_it_took_of_it(known):
    assert bool(known.decisions) == bool(known.paper)


@every_network
def test_each_field_of_a_recipe_has_a_row_or_a_reason_to_have_none(known):
    left = undecided_fields(known.load(known.recipe), decisions_of(known), [*no_row_of(known)])
    assert not left, (
        f"{left}: add a Decision for each to architectures/{known.name}/decisions.py, or name it in NO_ROW there with "
        "the reason; then run python -m trifuse.benchmarks.reporting.tables"
    )


@every_network
def test_rows_and_reasons_are_about_fields_that_there_are(known):
    there = [*field_names(known.load(known.recipe))]
    named = [name for decision in decisions_of(known) for name in decision.fields]
    assert [name for name in (*named, *no_row_of(known)) if name not in there] == []
    assert len(named) == len({*named}), "a field has two rows"
    assert {*named} & {*no_row_of(known)} == set()
    assert all(no_row_of(known).values())


@dataclass(frozen=True)
class Section:
    depth: int = 1


@dataclass(frozen=True)
class Whole:
    lr: float = 1.0
    shape: str | Section = "tiny"
    section: Section | None = None


def test_a_new_field_is_missed():
    assert [*field_names(Whole)] == ["lr", "shape", "section.depth"]
    known = [Decision("Rate", NOT_SAID, "lr", by="trifuse")]
    assert undecided_fields(Whole, known, ["shape"]) == ["section.depth"]
    assert undecided_fields(Whole, known, ["shape", "section.depth"]) == []


@every_network
def test_whose_choice_it_is_stands_wherever_the_paper_leaves_one(known):
    for decision in decisions_of(known):
        assert decision.by or (decision.is_said and decision.is_settled), decision.question
    questions = [decision.question for decision in decisions_of(known)]
    assert len(questions) == len({*questions})


# ------------------------------------------------------------------------------------------------- what a run answers


@every_network
def test_defaults_differ_from_no_default(known):
    recipe = recipe_of(known.name)
    asked = [decision for decision in decisions_of(known) if decision.applies(recipe)]
    assert all("default" not in decision.differs_from(recipe) for decision in asked)
    assert len(asked) > 30


def other_values(recipe: Any, dotted: str) -> list[Any]:
    """Values that a field does not have."""
    section, _, name = dotted.rpartition(".")
    now, kind = field_value(recipe, dotted), type(recipe)
    for part in section.split(".") if section else []:
        kind = dataclass_of(get_type_hints(kind)[part])
    if (choices := choices_of(get_type_hints(kind)[name])) is not None:
        return [choice for choice in choices if choice != now]
    if isinstance(now, bool):
        return [not now]
    if isinstance(now, int | float):
        return [now + 1, now * 2, now / 2]
    if isinstance(now, tuple):
        return [[one + 2 for one in now]] if all(isinstance(one, int | float) for one in now) else []
    return [0.5, 3]


@every_network
def test_what_set_changes_shows_in_its_row_and_in_no_other(known):
    changed = []
    before = rows(known.name)
    for decision in decisions_of(known):
        if len(decision.fields) != 1 or decision.answer is not None or decision.question not in before:
            continue
        for value in other_values(recipe_of(known.name), decision.field):
            try:
                recipe = recipe_of(known.name, f"{decision.field}={json.dumps(value)}")
            except (RecipeError, ValueError):  # it does not go with the other fields
                continue
            if not decision.applies(recipe):
                continue
            now = shown(field_value(recipe, decision.field))
            after = rows(known.name, f"{decision.field}={json.dumps(value)}")
            assert after[decision.question][1] == now != before[decision.question][1]
            agrees = field_value(recipe, decision.field) in decision.agrees
            expected = ["**paper**"] * (decision.is_settled and not agrees)
            expected += ["default"] * (decision.is_said or not agrees)
            assert after[decision.question][2] == ", ".join(expected), decision.question
            others = {question for question, cells in after.items() if cells[1] != before.get(question, cells)[1]}
            assert others <= {decision.question, "Fusion: schedule", "Stages"}
            changed.append(decision.question)
            break
    assert len(changed) >= ROWS_TO_CHANGE[known.name]


@pytest.mark.parametrize(
    ("name", "settings", "question", "answer", "differs"),
    [
        ("dino_unet", ["network.encoder_checkpoint=dinov2"], "Encoder: weights", "pretrained", "default"),
        ("dino_unet", [], "Encoder: weights", "random", "**paper**"),
        ("dino_unet", ["network.variant=base"], "Encoder", "base", "default"),
        (
            "dino_unet",
            ['network.variant={"embed_dim":8,"depth":6,"num_heads":2}'],
            "Encoder",
            "6 blocks, width 8",
            "**paper**, default",
        ),
        (
            "dino_unet",
            ["data.val_from=remaining"],
            "Split",
            "drawn, 10 % of the rest validate, 20 % test",
            "**paper**, default",
        ),
        ("dino_unet", ["lambda_dice=2"], "Loss", "Dice + cross-entropy, 2 to 1", "default"),
        ("dino_unet", ["data.split_seed=7"], "Seeds", "seed 42, init_seed 0, split_seed 7", "default"),
        ("dino_unet", ["training.optimizer=adam"], "Optimiser", "adam", "default"),
        ("dino_unet", ["training.optimizer=sgd"], "Optimiser", "sgd", "**paper**, default"),
        ("dino_unet", ["network.blocks=[7,5,3,1]"], "Blocks that become skips", "7, 5, 3, 1", "**paper**, default"),
        ("dino_unet", ["network.blocks=[7,5,3,1]"], "Fused map enters at", "last", ""),
        ("dino_unet", ["data.preprocessing.patches={}"], "Slices are seen", "patches", "**paper**"),
        ("fias", [], "Monte Carlo: gate", "se", "**paper**"),
        ("fias", ["network.gate=none"], "Monte Carlo: gate", "none", "default"),
        ("fias", ["training.epochs=400"], "Epochs", "400", ""),
        ("fias", ["gamma=0.25"], "Loss", "0.25 Dice + 0.75 cross-entropy", "**paper**, default"),
        ("fias", [], "CAF: pooled channels are", "normalised", "**paper**"),
        ("fias", ["network.channel_weights=literal"], "CAF: pooled channels are", "literal", "default"),
        ("fias", ["network.dilations=[1,1,2]"], "DilateFormer: dilations", "1, 1, 2", "default"),
        ("fias", ["network.no_dmk=dup"], "DMK: encoder of convolutions", "no: dup", "**paper**, default"),
        (
            "fias",
            ['data.preprocessing.intensity="window"', "data.preprocessing.window=[-125,275]"],
            "Intensities",
            "window, -125 to 275",
            "default",
        ),
        (
            "fias",
            ['network.variant={"embed_dim":24,"depths":[1,1,1,1]}'],
            "DilateFormer",
            "depths 1, 1, 1, 1, width 24",
            "**paper**, default",
        ),
        ("taff_unet", [], "Prior: comes from", "to be chosen", ""),
        ("taff_unet", ["prior.source=gt"], "Prior: comes from", "reference annotation", ""),
        ("taff_unet", ["network.projection=segments"], "ECG becomes a map by", "segments", ""),
        ("taff_unet", ["network.projection=broadcast"], "ECG becomes a map by", "broadcast", "**paper**, default"),
        ("taff_unet", ["network.detach_z=true"], "Segmentation trains the ECG", "no", "default"),
        ("taff_unet", ["entropy_sign=literal"], "Gate: sign of the entropy", "literal", "default"),
        ("taff_unet", ["data.max_interval_days=30"], "Longest interval, days", "30", "**paper**, default"),
        ("plain_unet", ["network.num_stages=4"], "Stages", "4", "default"),
        (
            "plain_unet",
            ["data.preprocessing.patches.spacing_mm=[1.0,1.5]"],
            "Pixels of patches, mm",
            "1, 1.5",
            "**paper**, default",
        ),
        (
            "plain_unet",
            ["lambda_ce=0.5"],
            "Loss, at each resolution",
            "Dice + cross-entropy, 1 to 0.5",
            "**paper**, default",
        ),
        ("plain_unet", ["data.split=mine.json"], "Split", "given", "default"),
    ],
)
def test_answers_are_those_of_the_recipe(name, settings, question, answer, differs):
    assert rows(name, *settings)[question][1:3] == [answer, differs]


@every_network
def test_how_a_run_is_trained_stands_in_every_table(known):
    """Optimiser, learning rate, schedule, batch, augmentation and loss; the fields that change them are named."""
    cells = rows(known.name)
    for question in ("Optimiser", "Learning rate", "Schedule", "Epochs", "Batch size", "Augmentation", "Loss"):
        named = {asked: option for asked, (*_, option) in cells.items() if asked.startswith(question)}
        assert named, question
        assert question == "Loss" or all(named.values())


@every_network
def test_strengths_of_the_augmentation_that_differ_are_named(known):
    asked, kind = "Strength of the augmentation", recipe_of(known.name).data.augment
    augment = ["data.augment=flip_rot"] if kind == "none" else []
    default = rows(known.name, *augment)[asked]
    assert default[1:] == ["as by default", "", "`data.augmentation.*`"]
    changed = rows(known.name, *augment, "data.augmentation.mirror_axes=[]", "data.augmentation.mirror_probability=0.2")
    by_the_paper = ["**paper**, default"] if default[0] == "nnU-Net's" else ["default"]
    assert changed[asked][1:3] == ["mirror_probability 0.2; mirror_axes none", *by_the_paper]
    assert asked not in rows(known.name, "data.augment=none")


def test_a_question_that_does_not_come_up_has_no_row():
    assert "SGD's momentum" in rows("plain_unet")
    assert "Adam's betas" not in rows("plain_unet")
    assert "Adam's betas" in rows("plain_unet", "training.optimizer=adamw", "training.schedule=constant")
    assert "Gate: sign of the entropy" not in rows("taff_unet", "network.setting=ap")
    assert "Gate: sees the time" not in rows("taff_unet", "network.setting=ecg_ap")
    assert "Patches per epoch" not in rows("dino_unet")
    assert rows("dino_unet")["Theta at the start"] == ["small random numbers (trifuse)", "normal, SD 0.01", "", ""]
    assert "Theta at the start" not in rows("dino_unet", "network.blocks=last4")


def test_the_data_of_a_run_say_where_its_split_came_from_and_what_chose_the_best_epoch():
    def data(split: Split | None, validated_on: Literal["train", "val"]) -> Any:
        return SimpleNamespace(cohort=SimpleNamespace(split=split), validated_on=validated_on)

    drawn = rows("fias", data=data(None, "val"))
    assert drawn["Split"][1:3] == ["drawn, 10 % validate, 20 % test", ""]
    assert drawn["Best epoch on"][1:3] == ["validation", ""]
    own = data(Split(("a",), (), ("b",)), "train")
    assert rows("fias", data=own)["Split"][1:3] == ["the cohort's own", ""]
    assert rows("fias", data=own)["Best epoch by"][1:3] == ["last", ""]
    by_itself = rows("fias", "training.best_epoch_by=last", data=own)["Best epoch by"]
    assert by_itself[1:3] == ["last", ""]  # which on these data is the default
    asked = rows("fias", "training.best_epoch_by=val_dice", data=own)
    assert asked["Best epoch by"][1:3] == ["val_dice", "default"]
    assert asked["Best epoch on"][1] == "training: none validate"
    assert rows("fias", data=data(None, "val"))["Best epoch by"][1:3] == ["val_dice", ""]
    held_out = rows("fias", "data.val_patients=2", data=own)["Split"]
    assert held_out[1:3] == ["the cohort's own; 2 training patients held out to validate", "**paper**, default"]
    assert rows("dino_unet", data=own)["Split"][2] == "**paper**"
    by_dice = rows("dino_unet", "training.best_epoch_by=val_dice", data=own)
    assert by_dice["Best epoch on"][2] == "**paper**"
    assert rows("fias", 'data.test_cases=["b"]', data=own)["Split"][1] == "given"


# ------------------------------------------------------------------------------------------------------- the section


@dataclass(frozen=True)
class Small:
    lr: float = 0.5
    names: tuple[str, ...] = ()
    seed: int = 7


SMALL = (
    Decision("Rate", "0.5", "lr", (0.5,)),
    Decision("Names, seed", NOT_SAID, ("names", "seed"), by="trifuse"),
    Decision("Loss", "open", (), by="another | paper", answer=lambda recipe, data: "Dice"),
)


def test_the_section_counts_what_differs_and_the_columns_are_aligned():
    heading, summary, table = decision_parts(SMALL, Small(lr=0.25, seed=8))
    assert heading == f"## {HEADING}"
    assert summary.startswith(
        "Of 3 points the paper speaks of 2; this run differs from it in 1 (Rate), and from the default alone in 1 "
        "(Names, seed). "
    )
    assert table.splitlines() == [
        "| Question    | The paper says          | This run           | Differs from       | Option          |",
        "| ----------- | ----------------------- | ------------------ | ------------------ | --------------- |",
        "| Rate        | 0.5                     | 0.25               | **paper**, default | `lr`            |",
        "| Names, seed | not said (trifuse)      | names none, seed 8 | default            | `names`, `seed` |",
        r"| Loss        | open (another \| paper) | Dice               |                    |                 |",
    ]
    assert decision_parts((), Small()) == []


@pytest.mark.parametrize(
    ("value", "text"), [(True, "yes"), (False, "no"), (None, "none"), (1e-5, "1e-05"), ((1, 2.5), "1, 2.5"), (3, "3")]
)
def test_values_are_written_as_a_reader_would(value, text):
    assert shown(value) == text


def test_fields_of_one_section_are_named_once():
    cells = rows("plain_unet")
    assert cells["Split"][3] == "`data.split`, `val_cases`, `test_cases`, `val_from`, `val_patients`"
    assert cells["Channels of an image"][3] == "`data.preprocessing.channels`, `network.in_channels`"
    assert cells["Loss, at each resolution"][3] == "`lambda_dice`, `lambda_ce`"
    assert cells["Slices are seen"][3] == ""
