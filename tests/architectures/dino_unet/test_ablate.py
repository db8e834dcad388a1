"""The ablation: every row of the paper's Table II, finished trainings kept, one table."""

from __future__ import annotations

import csv
from itertools import product

from finished_run import mark_finished

from trifuse.architectures.dino_unet import ablate as ablation
from trifuse.architectures.dino_unet.model import DinoUNet


def test_every_row_is_trained_once_and_tabulated(tmp_path, monkeypatch):
    recipes = []

    def train(recipe, run, *, resume):
        DinoUNet(recipe.network)  # the row can be built
        recipes.append(recipe)
        run.mkdir(exist_ok=True)
        mark_finished(run, recipe)

    class Row:
        def __init__(self, dsc):
            self.scores = {"dsc": dsc}

    monkeypatch.setattr(ablation, "train", train)
    read = "trifuse.architectures.runs.ablation.read_case_table"
    monkeypatch.setattr(read, lambda path: [Row(0.4 + 0.2 * ("seed1" in str(path))), Row(0.6)])
    table = ablation.ablate(tmp_path, seeds=2, epochs=3, cases=4, command=["trifuse", "ablate", "dino_unet"])
    trained = {(r.network.blocks, r.network.spatial_integration, r.training.seed) for r in recipes}
    rows = list(product((None, "last4", (7, 5, 3, 1)), (True, False)))
    assert trained == {(*row, seed) for row in rows for seed in (0, 1)}
    assert {recipe.training.epochs for recipe in recipes} == {3}
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    names = list(product(("learned", "last4", "fixed:[7,5,3,1]"), (True, False)))
    assert [(line["blocks"], line["image integration"] == "yes") for line in lines] == names
    assert {(line["mean DSC"], line["SD over seeds"]) for line in lines} == {("0.550", "0.071")}
    assert table.read_text().startswith("Synthetic: ")
    ablation.ablate(tmp_path, seeds=2, epochs=3, cases=4)
    assert len(recipes) == 12
    ablation.ablate(tmp_path, seeds=2, epochs=3, cases=6)  # other cases, and the same recipes
    assert len(recipes) == 24
    ablation.ablate(tmp_path, seeds=1, epochs=4, cases=6)
    assert len(recipes) == 30
