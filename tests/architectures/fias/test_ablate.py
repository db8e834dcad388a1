"""The ablation: every row of the paper's Table 3, finished trainings kept, one table."""

from __future__ import annotations

import csv

from finished_run import mark_finished

from trifuse.architectures.fias import Fias, demo
from trifuse.architectures.fias import ablate as ablation


class Row:
    def __init__(self, path, scores):
        seed = "seed1" in str(path)
        self.scores = {metric: value + seed * step for metric, (value, step) in scores.items()}


def test_every_row_is_trained_once_and_tabulated(tmp_path, monkeypatch):
    networks, recipes = [], []

    def train(recipe, run, *, resume):
        assert resume
        networks.append(Fias(recipe.network))  # the row can be built
        recipes.append(recipe)
        run.mkdir(exist_ok=True)
        mark_finished(run, recipe)

    def read(path):
        return [Row(path, {"dsc": (0.4, 0.2), "hd95_vox": (3, 1)}), Row(path, {"dsc": (0.6, 0.0), "hd95_vox": (5, 3)})]

    monkeypatch.setattr(demo, "SIZE", (32, 32, 4))
    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr("trifuse.architectures.runs.ablation.read_case_table", read)
    table = ablation.ablate(tmp_path, seeds=2, epochs=3, cases=4, command=["trifuse", "ablate", "fias"])
    assert [recipe.training.seed for recipe in recipes] == [0, 1] * 5
    assert [recipe.network.init_seed for recipe in recipes] == [0, 1] * 5
    assert {recipe.training.epochs for recipe in recipes} == {3}
    built = [(n.local_encoder is not None, n.config.fusion, n.config.mixatt) for n in networks[::2]]
    last = (True, "caf", True)
    assert built == [(False, "caf", True), (True, "sum", True), (True, "caf", False), last, last]
    assert [n.config.channel_weights for n in networks[::2]] == ["normalised"] * 4 + ["literal"]
    assert (tmp_path / "dmk-yes-fusion-caf-as-written-mixatt-yes-seed1").is_dir()

    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    rows = [(line["DMK"], line["fusion"], line["MixAtt"]) for line in lines]
    assert rows[:4] == [("no", "CAF", "yes"), ("yes", "sum", "yes"), ("yes", "CAF", "no"), ("yes", "CAF", "yes")]
    assert rows[4:] == [("yes", "CAF as written", "yes")]
    assert {(line["mean DSC"], line["SD of DSC"]) for line in lines} == {("0.550", "0.071")}
    assert {(line["mean HD95 (voxels)"], line["SD of HD95"]) for line in lines} == {("5.000", "1.414")}
    text = table.read_text()
    assert text.startswith("Synthetic: ")
    assert text.endswith("\n`trifuse ablate fias`\n")

    ablation.ablate(tmp_path, seeds=2, epochs=3, cases=4)
    assert len(recipes) == 10
