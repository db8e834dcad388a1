"""Workers that fail, hang or are killed: the sample is named, and the run goes on from its last checkpoint."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from children import Child
from tiny_run import Squares, bits, recipe, run

from trifuse.architectures.training import batches, loader_workers
from trifuse.architectures.training.batches import Batches
from trifuse.architectures.training.distributed import World
from trifuse.architectures.training.loader_workers import (
    KeyedSamples,
    WorkerLost,
    WorkerWatch,
    say_nothing_of_a_lost_reader,
)
from trifuse.architectures.training.memory import OutOfMemory
from trifuse.kernels.errors import CheckpointError, DataError, MissingExtra

ALONE = World(0, 1, torch.device("cpu"))


class Broken:
    """A data set in which one sample of one epoch is bad in one of several ways."""

    def __init__(self, how: str, epoch: int = 0) -> None:
        self.how, self.epoch = how, epoch

    def __len__(self) -> int:
        return 4

    def __getitem__(self, key):
        how = self.how if key[1:] == (self.epoch, 2) else "is good"
        if how == "raises":
            raise OSError("no such file")
        if how == "is refused":
            raise DataError("case_2", "spacing", got=OSError())
        if how == "ends its worker":
            os._exit(9)
        if how == "kills its worker":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            time.sleep(60)
        return {"image": torch.zeros(1)}

    def name_of(self, key):
        return f"case_{key[2]}"


@pytest.mark.parametrize(
    ("how", "workers", "message"),
    [
        ("raises", 0, r"^sample 2 of epoch 0 \(case_2\): OSError: got no such file$"),
        ("raises", 1, r"^sample 2 of epoch 0 \(case_2\): OSError: got no such file$"),
        ("is refused", 0, "^case_2: spacing: got $"),
        ("is refused", 1, "^case_2: spacing: got $"),
        ("ends its worker", 1, r"loader process \d+ ended with exit code 9, at sample 2 of epoch 0 \(case_2\); "),
        (
            "kills its worker",
            1,
            r"loader process \d+ was killed by SIGKILL, at sample 2 of epoch 0 \(case_2\); .*memory",
        ),
        ("hangs", 1, r"samples \[2\]: could not be loaded.*timed out"),
    ],
)
def test_t8_a_bad_sample_is_named(how, workers, message, monkeypatch):
    monkeypatch.setattr(batches, "_LONGEST_LOAD_S", 1.0)
    loader = Batches(Broken(how), recipe(batch_size=1, workers=workers), ALONE)
    with pytest.raises(WorkerLost if "its worker" in how else DataError, match=message):
        list(loader.epoch(0))
    loader.workers.close()


def test_t8_a_worker_that_dies_in_a_later_epoch_is_named_as_one_of_the_first():
    """Workers are started once, with the first epoch, and serve all."""
    loader = Batches(Broken("kills its worker", epoch=1), recipe(batch_size=1, workers=1), ALONE)
    list(loader.epoch(0))
    with pytest.raises(WorkerLost, match=r"was killed by SIGKILL, at sample 2 of epoch 1 \(case_2\)"):
        list(loader.epoch(1))
    loader.workers.close()


MORE_THAN_THERE_IS = 1 << 46  # bytes


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["numpy", "torch", "system", "collating"])
def test_t9_memory_that_runs_out_is_said_with_an_estimate_and_what_to_do(how, workers, tmp_path, monkeypatch):
    class Hungry(Squares):
        def __getitem__(self, key):
            if how == "numpy":
                np.empty(MORE_THAN_THERE_IS, np.uint8)
            if how == "torch":
                torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
            if how == "system":
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            return super().__getitem__(key)

        def name_of(self, key):
            return f"case_{key[2]}"

    if how == "collating":
        monkeypatch.setattr(loader_workers, "default_collate", lambda samples: torch.empty(MORE_THAN_THERE_IS))
    at = "a batch of 4 samples" if how == "collating" else r"sample \d of epoch 0 \(case_\d\)"
    whose = r"each of 2 such processes takes up to [\d.]+ GiB, together" if workers else "this process takes up to"
    with pytest.raises(
        OutOfMemory, match=rf"^{at}: memory ran out \(.+\); {whose} [\d.]+ GiB; .*fewer workers"
    ) as caught:
        run(tmp_path, data=Hungry(8), workers=workers)
    assert "last holds step 0 of the run: --resume goes on" in str(caught.value)


def test_t9_memory_that_runs_out_in_a_step_is_said_too(tmp_path):
    options = {"epochs": 2, "length": 8}
    steps = iter(range(100))

    def hungry(model, batch):
        if next(steps) == 3:
            torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
        return model(batch["image"])

    with pytest.raises(
        OutOfMemory, match=r"^training: memory ran out .*last holds step 2 of the run: --resume goes on"
    ):
        run(tmp_path, forward=hungry, **options)
    run(tmp_path, resume=True, **options)


def test_t9_other_errors_of_a_step_stay_what_they_are(tmp_path):
    def wrong(model, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(tmp_path, forward=wrong)


def test_t8_a_worker_killed_within_a_step_costs_what_came_after_the_last_checkpoint(tmp_path):
    options = {"workers": 2, "epochs": 2, "length": 12, "checkpoint_every_steps": 1, "batch_size": 2}
    run(tmp_path / "whole", **options)
    steps, others = iter(range(100)), set(multiprocessing.active_children())

    def killing(model, batch):
        if next(steps) == 3:
            os.kill((set(multiprocessing.active_children()) - others).pop().pid, signal.SIGKILL)
            time.sleep(10)
        return model(batch["image"])

    with pytest.raises(WorkerLost, match=r"SIGKILL, at sample .*last holds step 3 of the run: --resume goes on"):
        run(tmp_path / "killed", forward=killing, **options)
    run(tmp_path / "killed", resume=True, **options)
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")


def test_t8_a_refused_sample_says_where_the_run_goes_on(tmp_path):
    class Vanishing(Squares):
        def __getitem__(self, key):
            if key[1] == 1:
                raise DataError("case_7", "file", got="nothing there")
            return super().__getitem__(key)

    with pytest.raises(DataError, match=r"^case_7: file: got nothing there; .*last holds step 3 of the run: --resume"):
        run(tmp_path, data=Vanishing(10), workers=1)


def test_errors_cross_processes_as_kind_and_words():
    for error in (
        DataError("case", "field", got=OSError("x"), want=lambda: 0),
        CheckpointError("y"),
        MissingExtra("scipy", "med", "a report"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))


def test_t8_a_death_whose_exit_code_is_lost_is_still_named():
    """PyTorch raises within any call of the training process, one that fetches the exit code included."""
    watch = WorkerWatch(KeyedSamples(Squares(4), 1), 0)
    child = Child(lambda: None)
    child.wait()
    watch._processes = [SimpleNamespace(pid=child.pid, exitcode=None)]
    with (
        pytest.raises(WorkerLost, match=r"loader process \d+ was killed by SIGKILL, before its first sample"),
        watch.named_losses(),
    ):
        raise RuntimeError(f"DataLoader worker (pid {child.pid}) is killed by signal: Killed. ")


def test_a_worker_says_nothing_of_a_reader_that_has_gone(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: said.append(error[0]))
    say_nothing_of_a_lost_reader(0)
    for kind in (ConnectionResetError, ValueError, BrokenPipeError):
        sys.excepthook(kind, kind(), None)
    assert said == [ValueError]


def test_t8_a_death_that_pytorch_notices_after_the_pipe_broke(monkeypatch):
    watch = WorkerWatch(KeyedSamples(Squares(4), 1), 0)
    process = SimpleNamespace(pid=os.getpid(), exitcode=None)
    watch._processes = [process]

    def notice(seconds):
        process.exitcode = -signal.SIGKILL
        raise RuntimeError("DataLoader worker is killed by signal: Killed. ")

    monkeypatch.setattr(time, "sleep", notice)
    with pytest.raises(WorkerLost, match="was killed by SIGKILL"), watch.named_losses():
        raise EOFError
