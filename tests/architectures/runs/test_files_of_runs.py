"""The files of a run, by their names: all of them make way when another run replaces it."""

from __future__ import annotations

import pytest
from run_folders import RUN, begin, contents, fill, make_run

from trifuse.architectures.runs.claim import claim_run_folder

WRITTEN = [
    "recipe.json", "start.json", "sessions.jsonl", "log.csv", "report.md",
    "runs.csv", "summary.csv", "records.csv", "reconstruction.csv",
    "train_cases.csv", "val_summary.csv", "test_nnunet_cases.csv", "test_readouts.csv",
    "predictions/predictions.json", "predictions/val/predictions.json",
    "best/config.json", "best.new/model.safetensors.new", "best.old/score.json", "best.damaged/score.json",
    "last/training_state.safetensors", "last.new/log.json", "last.old/log.json", "last.damaged/log.json",
    "crash/step_12_rank_1.json", "tensorboard/events.out.tfevents.17.host.9.0",
    "mlflow/mlflow.db", "mlflow/mlflow.db-journal", "mlflow/run_id",
    "cache/" + "0c" * 32 + ".safetensors", ".trifuse-0-1-2/model.safetensors",
]  # fmt: skip
"""What runs of every kind write, and what a kill may leave of it, beside `RUN`."""


@pytest.mark.parametrize("below", ["", "run_2/", "first_pass/fold_1/", "run_1/first_pass/network/"])
def test_l4_l15_all_that_a_run_writes_goes_aside_with_it(tmp_path, below):
    out = make_run(tmp_path / "run")
    fill(out / below, dict.fromkeys(WRITTEN, "written") | {"results.json": RUN["results.json"]})
    before = contents(out)
    with claim_run_folder(out, overwrite=True):
        assert contents(out).keys() == {f"replaced_run/{name}" for name in before}
        begin(out)
