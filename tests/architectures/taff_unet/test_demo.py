"""The demo at tiny size: phantom, ECGs, first pass, both trainings, and all pictures in one go."""

from __future__ import annotations

import pytest
import torch

from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.taff_unet import TaffUNet, demo
from trifuse.architectures.taff_unet.ablate import TITLES
from trifuse.architectures.taff_unet.report import SCAR
from trifuse.architectures.training.run_folder import OutputFolderError

TINY = {
    **{"SIZE": 48, "SLICES": 5, "PARTS": (3, 1, 2), "BASE_DIM": 4, "EPOCHS": 1, "FIRST_PASS_EPOCHS": 1},
    **{"SAMPLES_PER_EPOCH": 8, "ECG_EPOCHS": 4, "JOBS": 1},
}
PICTURES = ("with_and_without_time", "bullseye", "lead_attention", "temporal_attention", "gate_weights", "curves")


@pytest.mark.slow
def test_demo_goes_the_whole_way(tmp_path, capsys, monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setattr(demo, name, value)
    threads = torch.get_num_threads()
    report = demo.run_demo(tmp_path, seed=1, command=["trifuse", "demo", "taff_unet"])
    assert torch.get_num_threads() == threads
    text = report.read_text()
    assert text.startswith("# TAFF-UNet (full, predicted prior) on phantom")
    assert "trifuse demo taff_unet" in text
    assert "started from weights of best" in text
    for name in PICTURES:
        assert f"figures/{name}.png" in text
    printed = capsys.readouterr().out
    assert str(report) in printed
    assert "audit/test/audit.png" in text
    assert (report.parent / "audit" / "test" / "audit.md").exists()
    assert "with_and_without_time.png" in printed
    rows = read_case_table(report.parent / "test_cases.csv")
    assert {row.case_id for row in rows} == {"case005", "case006"}
    assert set(TITLES) <= set(rows[0].scores)  # what the ablation reads
    assert SCAR in {row.class_name for row in rows}
    assert TaffUNet.from_pretrained(report.parent / "best").config.setting == "full"
    assert TaffUNet.from_pretrained(tmp_path / "without_time" / "best").config.setting == "ecg_ap"
    with pytest.raises(OutputFolderError, match="--overwrite"):
        demo.run_demo(tmp_path)


def test_recipe_is_the_paper_s_where_a_demo_can_afford_it(tmp_path):
    recipe = demo.demo_recipe(tmp_path, seed=3)
    assert (recipe.network.setting, recipe.prior.source) == ("full", "predicted")
    assert recipe.data.augment == "nnunet"
    assert recipe.entropy_sign == "maximise"
    assert recipe.lambda_entropy == 3e-3
    assert recipe.network.fusion_stage == 3
    assert recipe.network.init_seed == recipe.training.seed == 3
    assert demo.demo_recipe(tmp_path, setting="ap", oracle=True, ecg=tmp_path).network.ecg_checkpoint is None
    assert demo.demo_recipe(tmp_path, labels=tmp_path / "labels").prior.labels == str(tmp_path / "labels")
