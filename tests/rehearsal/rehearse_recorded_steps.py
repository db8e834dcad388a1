"""Steps recorded as CUDA graphs: what they leave behind is what eager steps leave; and which steps are not recorded."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from tiny_run import EVERYTHING, Squares, TinyNet, bits, recipe, run

from trifuse.architectures.training.distributed import World
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.architectures.training.recorded_step import step_type
from trifuse.architectures.training.signals import Interrupted
from trifuse.architectures.training.step import TrainingStep
from trifuse.kernels.errors import NumericError

RECORDED = "steps are recorded as CUDA graphs"
EAGER = "steps run eagerly: "
EPOCHS, EAGER_STEPS = 4, 3  # of each shape
OPTIONS = {"epochs": EPOCHS, "device": "cuda", "precision": "fp32"}  # each epoch has two steps of 4 and one of 2


@pytest.fixture
def replays(monkeypatch):
    """The graphs that were replayed."""
    counted = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (counted.append(graph), replay(graph)))
    return counted


@pytest.fixture
def said(capsys):
    return lambda: [line for line in capsys.readouterr().out.splitlines() if line.startswith("steps ")]


def assert_recorded_as_eager(folder, **options):
    """Train with recordings and without, and hold what they leave behind against each other, bit by bit."""
    options = {**OPTIONS, **options}
    run(folder / "eager", **options)
    run(folder / "recorded", cuda_graph=True, **options)
    assert bits(folder / "recorded") == bits(folder / "eager")


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_recorded_steps_leave_the_bits_of_eager_ones(tmp_path, said, replays, optimizer):
    """With dropout, statistics, averages, micro-batches, clipping, and a rate that moves."""
    assert_recorded_as_eager(tmp_path, **{**EVERYTHING, "optimizer": optimizer})
    assert said() == [RECORDED]
    whole, last = 2 * EPOCHS - EAGER_STEPS, EPOCHS - EAGER_STEPS
    assert len(replays) == whole * (2 + 2) + last * (1 + 2)  # their micro-batches; clipping and update


def test_a_recorded_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path, replays):
    """With or without recordings: they change no result."""
    calls = []

    class Stopping(Squares):
        def __getitem__(self, key):
            calls.append(key)
            if len(calls) == 17:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(key)

    options = {**OPTIONS, **EVERYTHING}
    run(tmp_path / "whole", cuda_graph=True, **options)
    for name, goes_on_recorded in (("same", True), ("other", False)):
        calls.clear()
        with pytest.raises(Interrupted):
            run(tmp_path / name, cuda_graph=True, data=Stopping(10), **options)
        replays.clear()
        run(tmp_path / name, cuda_graph=goes_on_recorded, resume=True, **options)
        assert bits(tmp_path / name) == bits(tmp_path / "whole")
        assert bool(replays) == goes_on_recorded


def test_a_replay_that_is_not_finite_changes_no_weight(tmp_path, replays):
    class PoisonedLate(Squares):
        def __getitem__(self, key):
            sample = super().__getitem__(key)
            if key[1:] == (EPOCHS - 1, 7):
                sample["image"][0, 0, 0] = torch.nan
            return sample

    model = TinyNet()
    with pytest.raises(NumericError, match=r"loss is not finite at step \d+; first seen in the input 'image'"):
        run(tmp_path, model=model, cuda_graph=True, data=PoisonedLate(10), ema_decay=0.9, **OPTIONS)
    assert replays
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    (path,) = (tmp_path / "crash").iterdir()
    assert isinstance(json.loads(path.read_text())["learning_rates"]["all"], float)


def test_a_gradient_of_a_replay_that_is_not_finite_is_found(tmp_path, replays):
    """Although the step before, of another shape, had gradients of its own."""

    class Grounded(Squares):
        def __getitem__(self, key):
            return super().__getitem__(key) | {"ground": torch.tensor(float(key[1] < EPOCHS - 2))}

    def forward(model, batch):
        return model(batch["image"]) + (model.head.bias[0] * 0 + batch["ground"].mean()).sqrt()

    with pytest.raises(NumericError, match=r"at step 6; first seen in the gradient of 'head.bias'"):
        run(tmp_path, cuda_graph=True, data=Grounded(10), forward=forward, **OPTIONS)
    assert replays


def test_what_a_loss_decides_for_an_epoch_is_recorded_for_it(tmp_path, said, replays):
    class Fading(SegmentationLoss):
        def start_epoch(self, epoch):
            self.__dict__["weight"] = 0.5**epoch

        def __call__(self, outputs, batch, reduce):
            return self.weight * super().__call__(outputs, batch, reduce)

    assert_recorded_as_eager(tmp_path, loss=Fading())
    assert said() == [RECORDED]
    assert replays


def test_a_loss_that_waits_for_the_device_is_not_recorded(tmp_path, said, replays):
    def waiting(outputs, batch, reduce):
        loss = SegmentationLoss()(outputs, batch, reduce)
        return loss * (2.0 if float(loss.detach()) > 0 else 1.0)

    assert_recorded_as_eager(tmp_path, loss=waiting)
    (line,) = said()
    assert line.startswith(f"{EAGER}the host waits for the device in ")
    assert replays == []


def test_a_pass_that_reads_words_is_not_recorded(tmp_path, said, replays):
    """Those of one batch would be those of all."""

    def forward(model, batch):
        return model(batch["image"]) * len(batch["case_id"])

    assert_recorded_as_eager(tmp_path, forward=forward)
    assert said() == [f"{EAGER}they cannot be recorded: KeyError: 'case_id'"]
    assert replays == []


def test_more_shapes_than_two_run_eagerly(tmp_path, said, replays):
    class Growing(Squares):
        def __getitem__(self, key):
            sample = super().__getitem__(key)
            rows = 8 - key[1] // EPOCHS
            return sample | {name: sample[name][..., :rows, :] for name in ("image", "target")}

    assert_recorded_as_eager(tmp_path, **{"data": Growing(10), "epochs": 3 * EPOCHS})
    assert said() == [RECORDED, "steps of other shapes than the first 2 run eagerly"]
    assert replays


def test_the_loss_scaling_of_fp16_is_not_recorded(tmp_path, said, replays):
    run(tmp_path, cuda_graph=True, **{**OPTIONS, "precision": "fp16"})
    (line,) = said()
    assert line.startswith(f"{EAGER}the loss scaling of fp16 ")
    assert replays == []


def test_several_processes_are_not_recorded():
    said = []
    world = World(0, 2, torch.device("cuda", 0))
    assert step_type(recipe(cuda_graph=True), world, said.append) is TrainingStep
    assert said == [f"{EAGER}the host waits for the gradients of the other processes"]
