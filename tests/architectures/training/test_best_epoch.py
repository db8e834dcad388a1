"""The epoch that is kept as best: by the score that the recipe names, or the last."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_run import TinyNet, run

from trifuse.architectures.storage.best_epoch import BestEpoch
from trifuse.architectures.storage.config_json import config_from_json, config_to_json
from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.kernels import TrifuseError

SCORES = {"dice": (0.5, 0.6, 0.9, 0.4), "dice_scar": (0.3, 0.7, 0.2, 0.1)}
NAN = float("nan")


class Scores:
    """Validation that gives one set of scores after another; which one is told by the rows of the run's log."""

    def __init__(self, out, **scores):
        self._log, self._scores = out / "log.csv", scores or SCORES

    def __call__(self, model):
        done = len(read_log(self._log)) if self._log.exists() else 0
        return {name: values[done] for name, values in self._scores.items()}


def chosen(out, **options) -> BestEpoch:
    run(out, validate=Scores(out), **{"epochs": 4, **options})
    return BestEpoch.read(out / "best")


def test_the_score_that_is_named_decides(tmp_path):
    assert chosen(tmp_path / "all") == BestEpoch(3, "dice", 0.9)
    assert chosen(tmp_path / "scar", best_epoch_by="val_dice_scar") == BestEpoch(2, "dice_scar", 0.7)
    smoothed = chosen(tmp_path / "smoothed", best_epoch_by="val_dice_scar", best_epoch_smoothing=0.5)
    assert smoothed == BestEpoch(2, "dice_scar_smoothed", pytest.approx(0.5))
    assert "val_dice_scar_smoothed" in read_log(tmp_path / "smoothed" / "log.csv")[0]


@pytest.mark.parametrize("smoothing", [None, 0.9])
def test_the_last_epoch_is_kept_whatever_its_scores(tmp_path, smoothing):
    result = run(
        tmp_path,
        validate=lambda model: {"dice": NAN},
        epochs=3,
        best_epoch_by="last",
        best_epoch_smoothing=smoothing,
    )
    assert (result.best_epoch, result.best_score) == (3, None)
    assert read_record(tmp_path / "best" / "score.json") == {"epoch": 3, "metric": "last", "score": None}
    best, last = (TinyNet.from_pretrained(tmp_path / folder) for folder in ("best", "last"))
    assert torch.equal(best.head.weight, last.head.weight)
    assert not any(name.endswith("smoothed") for name in read_log(tmp_path / "log.csv")[0])


def test_a_score_that_validation_lacks_is_refused_before_the_first_step(tmp_path):
    steps = []
    with pytest.raises(TrifuseError, match=r"no 'val_iou' .* 'last' or to what it has: val_dice, val_dice_scar"):
        chosen(tmp_path, best_epoch_by="val_iou", forward=lambda model, batch: steps.append(1))
    assert steps == []


def test_what_decides_does_not_change_unasked_when_a_run_is_resumed(tmp_path):
    chosen(tmp_path, epochs=2)
    again = {"epochs": 2, "best_epoch_by": "last"}
    with pytest.raises(OutputFolderError, match=r"recipe\.best_epoch_by: 'val_dice' -> 'last'"):
        chosen(tmp_path, resume=True, **again)


def test_scores_of_two_kinds_are_not_compared(tmp_path, capsys):
    """0.6 was the best Dice; the scar's 0.2 is the best of its kind, for no earlier one is known."""
    chosen(tmp_path, epochs=2)
    options = {"epochs": 4, "best_epoch_by": "val_dice_scar", "force_resume": True}
    assert chosen(tmp_path, **options) == BestEpoch(3, "dice_scar", 0.2)
    assert "from here on dice_scar decides" in capsys.readouterr().out


def test_a_moving_average_comes_and_goes_where_it_is_forced(tmp_path):
    chosen(tmp_path, epochs=1)
    assert chosen(tmp_path, epochs=2, best_epoch_smoothing=0.5, force_resume=True).metric == "dice_smoothed"
    assert chosen(tmp_path, epochs=3, best_epoch_by="last", force_resume=True) == BestEpoch(3, "last", None)
    smoothed = [row["val_dice_smoothed"] for row in read_log(tmp_path / "log.csv")]
    assert smoothed == pytest.approx([NAN, 0.6, NAN], nan_ok=True)


def test_a_moving_average_of_another_score_begins_anew(tmp_path):
    chosen(tmp_path, epochs=2, best_epoch_smoothing=0.5)
    options = {"epochs": 4, "best_epoch_by": "val_dice_scar", "best_epoch_smoothing": 0.5, "force_resume": True}
    assert chosen(tmp_path, **options) == BestEpoch(3, "dice_scar_smoothed", 0.2)
    smoothed = [row["val_dice_scar_smoothed"] for row in read_log(tmp_path / "log.csv")]
    assert smoothed == pytest.approx([NAN, NAN, 0.2, 0.15], nan_ok=True)


def test_a_run_that_knew_no_choice_is_resumed_as_what_it_was(tmp_path):
    chosen(tmp_path, epochs=2)
    description = read_record(tmp_path / "run.json")
    del description["recipe"]["best_epoch_by"], description["recipe"]["best_epoch_smoothing"]
    write_record(tmp_path / "run.json", description)
    assert chosen(tmp_path, epochs=2, resume=True) == BestEpoch(2, "dice", 0.6)
    with pytest.raises(OutputFolderError, match=r"best_epoch_by: 'val_dice' -> 'last'"):
        chosen(tmp_path, epochs=2, resume=True, best_epoch_by="last")


def test_a_recipe_that_knew_no_choice_loads_as_what_it_was():
    values = config_to_json(Recipe(epochs=1, batch_size=1, lr=1.0))
    del values["best_epoch_by"], values["best_epoch_smoothing"]
    recipe = config_from_json(Recipe, values, "run.json")
    assert (recipe.best_epoch_by, recipe.best_epoch_smoothing) == ("val_dice", None)


def test_who_leaves_it_to_the_data_has_dice_where_cases_validate_and_the_last_epoch_where_none_do(tmp_path):
    recipe = Recipe(epochs=1, batch_size=1, lr=1.0)
    assert recipe.best_epoch_by is None
    assert (recipe.settled(validates=True).best_epoch_by, recipe.settled(validates=False).best_epoch_by) == (
        "val_dice",
        "last",
    )
    for given in ("last", "val_dice", "val_dice_scar"):
        asked = replace(recipe, best_epoch_by=given)
        assert asked.settled(validates=True) == asked.settled(validates=False) == asked
    chosen(tmp_path)  # `fit` has scores, and nobody to ask where they come from
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["best_epoch_by"] == "val_dice"


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("dice", "epoch 2 of 5, by Dice on the val cases"),
        ("dice_smoothed", "epoch 2 of 5, by Dice, averaged over epochs, on the val cases"),
        ("dice_blood pool", "epoch 2 of 5, by Dice of blood pool on the val cases"),
        ("last", "epoch 2 of 5, the last one, whatever its scores"),
    ],
)
def test_the_choice_in_words(metric, words):
    assert BestEpoch(2, metric, 0.5).words("the val cases", 5) == words
