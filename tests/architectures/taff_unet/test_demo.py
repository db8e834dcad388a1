"""The demo at tiny size: phantom, ECGs, first pass, both trainings, and all pictures in one go."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from trifuse.architectures.data.phantoms import ambiguous
from trifuse.architectures.evaluation.summary import SCAR
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.taff_unet import EXPERIMENT, TaffUNet, demo
from trifuse.architectures.taff_unet.ablate import TITLES
from trifuse.architectures.taff_unet.phantoms import DEMOS
from trifuse.architectures.training.run_folder import OutputFolderError

TINY = {
    **{"image_size": 48, "slices": 5, "parts": (3, 1, 2), "base_dim": 4, "epochs": 1, "first_pass_epochs": 1},
    **{"samples_per_epoch": 8, "ecg_epochs": 4, "fusion_stage": 1},
}
PICTURES = ("with_and_without_time", "bullseye", "lead_attention", "temporal_attention", "gate_weights", "curves")


def few_beats(write, folder, beats, seed):
    write(folder, 20, seed)


def on_one_thread(work, *arguments):
    assert torch.get_num_threads() == 1
    work(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("phantom", DEMOS)
def test_demo_goes_the_whole_way(phantom, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(DEMOS, phantom, replace(DEMOS[phantom], **TINY))
    monkeypatch.setattr(demo, "JOBS", 1)
    monkeypatch.setattr(ambiguous, "write_beats", partial(few_beats, ambiguous.write_beats))
    monkeypatch.setattr(demo, "show_audit", partial(on_one_thread, demo.show_audit))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        report = demo.run_demo(tmp_path, phantom=phantom, seed=1, command=["trifuse", "demo", "taff_unet"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    text = report.read_text()
    assert text.startswith("# TAFF-UNet (full, predicted prior) on phantom")
    assert "trifuse demo taff_unet" in text
    assert "started from weights of best" in text
    for name in PICTURES:
        assert f"figures/{name}.png" in text
    printed = capsys.readouterr().out
    assert str(report) in printed
    assert "for scar, " in printed
    assert "audit/test/audit.png" in text
    assert (report.parent / "audit" / "test" / "audit.md").exists()
    assert "with_and_without_time.png" in printed
    rows = read_case_table(report.parent / "test_cases.csv")
    assert {row.case_id for row in rows} == {"case005", "case006"}
    assert set(TITLES) <= set(rows[0].scores)  # what the ablation reads
    assert SCAR in {row.class_name for row in rows}
    assert TaffUNet.from_pretrained(report.parent / "best").config.setting == "full"
    assert TaffUNet.from_pretrained(tmp_path / "without_time" / "best").config.setting == "ecg_ap"
    assert {path.parent.name for path in tmp_path.glob("*/run.json")} == {*EXPERIMENT.demo.folders}
    with pytest.raises(OutputFolderError, match="--overwrite"):
        demo.run_demo(tmp_path, phantom=phantom)


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


def test_what_the_ambiguous_phantom_differs_in(tmp_path):
    """Its map at the fusion is of 32 x 32, and its autoencoder sees beats that belong to no image."""
    plan = DEMOS["ambiguous"]
    recipe = demo.demo_recipe(tmp_path, plan, arteries=tmp_path / "truth.csv")
    assert recipe.network.image_size >> recipe.network.fusion_stage == 32
    assert recipe.prior.arteries == str(tmp_path / "truth.csv")
    assert demo.ecg_recipe(tmp_path, plan).data.kind == "cohort", "fewer than ten such beats cannot spare a tenth"
    (tmp_path / "beats").mkdir()
    for number in (9, 10):
        assert demo.ecg_recipe(tmp_path, plan).data.kind == "cohort"
        (tmp_path / "beats" / f"beat{number:04d}.npz").touch()
    data = demo.ecg_recipe(tmp_path, plan).data
    assert (data.root, data.kind, data.val_records) == (str(tmp_path / "beats"), "records", ("*0",))
    assert demo.ecg_recipe(tmp_path).data.kind == "cohort"
