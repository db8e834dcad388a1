"""The demo at tiny size: phantom, training, prediction, scores and report in one go."""

from __future__ import annotations

import pytest
import torch

from trifuse.architectures.data.phantoms.abdomen_anatomy import ORGANS
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.fias import Fias, demo
from trifuse.architectures.fias.ablate import TITLES
from trifuse.architectures.training.run_folder import OutputFolderError


@pytest.fixture
def tiny(monkeypatch):
    for name, value in (("CASES", 4), ("SIZE", (32, 32, 10)), ("EPOCHS", 1)):
        monkeypatch.setattr(demo, name, value)


@pytest.mark.usefixtures("tiny")
@pytest.mark.slow
def test_demo_goes_the_whole_way(tmp_path, capsys):
    threads = torch.get_num_threads()
    report = demo.run_demo(tmp_path, seed=0, command=["trifuse", "demo", "fias"])
    assert torch.get_num_threads() == threads
    text = report.read_text()
    assert "trifuse demo fias" in text
    rows = read_case_table(report.parent / "test_cases.csv")
    assert [row.class_name for row in rows] == list(ORGANS)
    assert {row.case_id for row in rows} == {"case0004"}
    assert set(TITLES) <= set(rows[0].scores)  # what the ablation reads
    assert {row.conventions.label.split(";")[0] for row in rows} == {"empty_masks=strict"}
    printed = capsys.readouterr().out
    assert str(report) in printed
    assert "audit/test/audit.png" in text
    assert (report.parent / "audit" / "test" / "audit.md").exists()
    assert "overlays.png" in printed
    assert (report.parent / "predictions" / "test" / "case0004.nii.gz").exists()
    assert Fias.from_pretrained(report.parent / "best").config.num_classes == 9
    with pytest.raises(OutputFolderError, match="--overwrite"):
        demo.run_demo(tmp_path)


def test_recipe_is_the_paper_s_where_a_demo_can_afford_it(tmp_path):
    recipe = demo.demo_recipe(tmp_path, tmp_path / "split.json", seed=3)
    assert (recipe.gamma, recipe.subsets, recipe.reduction) == (0.4, "mutation", "sum")
    assert recipe.data.label_space == "transunet9"
    assert recipe.data.preprocessing.intensity == "as_is"  # the package's images are in [0, 1] as they come
    assert (recipe.data.preprocessing.resize, recipe.data.preprocessing.restore) == ("cubic", "labels")
    assert recipe.network.init_seed == recipe.training.seed == 3
    assert recipe.network.fusion == "caf"
    assert recipe.network.mixatt
    assert recipe.network.no_dmk is None
