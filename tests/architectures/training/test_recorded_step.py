"""Where steps are not recorded as CUDA graphs, and what is said then; recording is rehearsed on a stand-in GPU."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_run import bits, recipe, run

from trifuse.architectures.training.distributed import World
from trifuse.architectures.training.recorded_step import RecordedStep, step_type
from trifuse.architectures.training.step import TrainingStep

EAGER = "steps run eagerly: "


@pytest.mark.parametrize(
    ("device", "ranks", "precision", "reason"),
    [
        ("cpu", 1, "fp32", "there are no CUDA graphs on a CPU"),
        ("cuda", 2, "fp32", "the host waits for the gradients of the other processes"),
        ("cuda", 1, "fp16", "the loss scaling of fp16 decides on the host which steps count; bf16 needs none"),
        ("cuda", 1, "bf16", None),
    ],
)
def test_the_reason_is_said_at_the_start(device, ranks, precision, reason):
    said = []
    world = World(0, ranks, torch.device(device))
    assert step_type(recipe(precision=precision), world, said.append) is TrainingStep
    assert said == []
    chosen = step_type(recipe(precision=precision, cuda_graph=True), world, said.append)
    assert (chosen, said) == ((RecordedStep, []) if reason is None else (TrainingStep, [EAGER + reason]))


def test_on_a_cpu_it_changes_nothing_and_is_free_to_change(tmp_path, capsys):
    run(tmp_path / "plain", epochs=2, schedule="constant")
    capsys.readouterr()
    run(tmp_path / "asked", epochs=1, schedule="constant", cuda_graph=True)
    assert f"{EAGER}there are no CUDA graphs on a CPU\n" in capsys.readouterr().out
    run(tmp_path / "asked", epochs=2, schedule="constant", resume=True)
    before, after = (json.loads(line)["cuda_graph"] for line in (tmp_path / "asked/sessions.jsonl").open())
    assert (before, after) == (True, False)
    assert bits(tmp_path / "asked") == bits(tmp_path / "plain")
