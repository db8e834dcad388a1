"""Runs that are stopped and go on: with the same bits, and only as what they were."""

from __future__ import annotations

import json
import signal

import pytest
from children import Child
from tiny_run import EVERYTHING, StopAt, TinyConfig, TinyNet, bits, run

from trifuse.architectures.storage.epoch_log import read_log, read_start
from trifuse.architectures.storage.record import read_record
from trifuse.architectures.training.memory import OutOfMemory
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.architectures.training.signals import Interrupted


def test_checkpoints_within_an_epoch(tmp_path):
    steps = []

    def fails(model, batch):
        steps.append(batch)
        if len(steps) == 6:
            raise RuntimeError("something else went wrong")
        return model(batch["image"])

    with pytest.raises(RuntimeError, match="something else went wrong"):
        run(tmp_path, checkpoint_every_steps=2, forward=fails)
    position = json.loads((tmp_path / "last" / "training_state.json").read_text())["position"]
    assert (position["step"], position["epoch"], position["step_in_epoch"]) == (4, 1, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(("call", "step"), [(1, 1), (4, 2), (5, 3)])
def test_t5_a_signal_stops_at_the_next_step_and_resuming_changes_nothing_t20(tmp_path, call, step, number):
    """Micro-batches per step: 2, 2, 1; mid-step, mid-epoch, and the last step of an epoch."""
    run(tmp_path / "whole", **EVERYTHING)
    with pytest.raises(Interrupted, match=rf"stopped by {number.name} after step {step}; resume"):
        run(tmp_path / "cut", **EVERYTHING, forward=StopAt(call, number))
    position = json.loads((tmp_path / "cut" / "last" / "training_state.json").read_text())["position"]
    assert position["step"] == step
    run(tmp_path / "cut", **EVERYTHING, resume=True)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
    assert signal.getsignal(number) is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_t5_second_signal_ends_at_once(tmp_path, number):
    child = Child(lambda: run(tmp_path, forward=StopAt(2, number, times=2)))
    assert child.wait() == -number
    assert json.loads((tmp_path / "last" / "training_state.json").read_text())["position"]["step"] == 0


def test_t5_an_echo_under_torchrun_is_not_a_second_signal(tmp_path):
    child = Child(lambda: run(tmp_path, forward=StopAt(2, signal.SIGTERM, times=2)), TORCHELASTIC_RUN_ID="1")
    assert child.wait() == 75


def test_what_a_network_was_before_its_first_step_is_kept(tmp_path):
    """By column of the log, without what is no number; the run that goes on leaves it as it is."""

    def describe(model):
        return {"weight": float(model.body.weight.detach().sum()), "empty": float("nan")}

    options = {**EVERYTHING, "describe": describe}
    with pytest.raises(Interrupted):
        run(tmp_path, **options, forward=StopAt(5))
    start = read_start(tmp_path)
    assert start.keys() == {"val_dice", "weight"}
    assert start["weight"] == describe(TinyNet(TinyConfig(norm="batch", dropout=0.2)))["weight"]
    run(tmp_path, **options, resume=True)
    assert read_start(tmp_path) == start
    assert {row["weight"] for row in read_log(tmp_path / "log.csv")}.isdisjoint({start["weight"]})


def test_a_run_of_an_older_version_does_not_say_how_it_started(tmp_path):
    assert read_start(tmp_path) == {}


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run(tmp_path)
    assert run(tmp_path, resume=True, forward=None) == first


def test_t13_t14_another_recipe_or_configuration_is_refused_and_forced(tmp_path, capsys):
    run(tmp_path, epochs=2, run_config={"digest": "a"})
    for changes in (
        {"lr": 0.5},
        {"epochs": 1},
        {"epochs": 3, "lr": 0.5},
        {"batch_size": 2},
        {"accumulate": 2},
        {"run_config": {"digest": "b"}},
        {"length": 9},
    ):
        with pytest.raises(OutputFolderError, match=r"another configuration:\n  .* -> "):
            run(tmp_path, **{"epochs": 2, "run_config": {"digest": "a"}, "resume": True} | changes)
    with pytest.raises(OutputFolderError, match="already holds a run"):
        run(tmp_path, epochs=2, run_config={"digest": "a"})
    capsys.readouterr()
    assert run(tmp_path, epochs=3, lr=0.5, run_config={"digest": "a"}, force_resume=True).steps == 9
    said = capsys.readouterr().out
    assert "changed configuration: recipe.epochs: 2 -> 3" in said
    assert "changed configuration: recipe.lr: " in said
    assert [row["epoch"] for row in read_log(tmp_path / "log.csv")] == [1, 2, 3]


@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "stopped"])
def test_t13_more_epochs_are_no_other_run(tmp_path, capsys, stopped):
    """Said once; the epochs to come end as those of a run that was that long from its start, where rates are one."""
    options = {"schedule": "constant", "ema_decay": 0.5}
    run(tmp_path / "long", epochs=3, **options)
    out = tmp_path / "run"
    if stopped:
        with pytest.raises(Interrupted):
            run(out, epochs=2, **options, forward=StopAt(4))
    else:
        run(out, epochs=2, **options)
    capsys.readouterr()
    assert run(out, epochs=3, resume=True, **options).steps == 9
    assert capsys.readouterr().out.count("changed configuration") == 1
    assert bits(out) == bits(tmp_path / "long")
    assert read_record(out / "run.json")["recipe"]["epochs"] == 3


def test_t14_a_forced_resume_that_does_not_come_to_a_checkpoint_changes_nothing(tmp_path):
    run(tmp_path, epochs=1)
    before = (tmp_path / "run.json").read_bytes()

    def fails(model, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(OutOfMemory, match="out of memory"):
        run(tmp_path, epochs=2, batch_size=64, force_resume=True, forward=fails)
    assert (tmp_path / "run.json").read_bytes() == before
    run(tmp_path, epochs=1, resume=True)
    run(tmp_path, epochs=2, batch_size=2, force_resume=True)
    run(tmp_path, epochs=2, batch_size=2, resume=True)


def test_what_does_not_change_the_result_may_change(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, forward=StopAt(2))
    run(tmp_path, resume=True, checkpoint_every_steps=1, workers=1)
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [(s["steps_done"], s["workers"]) for s in sessions] == [(0, 0), (2, 1)]


def test_the_network_is_told_which_epoch_begins_or_goes_on(tmp_path):
    class Listening(TinyNet):
        def __init__(self):
            super().__init__()
            self.told = []

        def start_epoch(self, epoch):
            self.told.append(epoch)

    model = Listening()
    with pytest.raises(Interrupted):
        run(tmp_path, model=model, forward=StopAt(5))
    assert model.told == [0, 1]
    model = Listening()
    run(tmp_path, model=model, resume=True)
    assert model.told == [1, 2]
