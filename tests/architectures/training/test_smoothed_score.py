"""The best epoch by a moving average of its score; three groups with their own optimisers; both killed and resumed."""

from __future__ import annotations

import random
import signal

import pytest
import torch
from children import Child
from tiny_run import KilledAt, TinyNet, bits, run

from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.storage.record import read_record

SCORES = (0.2, 0.9, 0.0, 0.75, 0.5)
NAN = float("nan")


class Scores:
    """Validation that gives one score after another; which one is told by the rows that the run's log has already."""

    def __init__(self, out, scores=SCORES):
        self._log, self._scores = out / "log.csv", scores

    def __call__(self, model):
        return {"dice": self._scores[len(read_log(self._log)) if self._log.exists() else 0]}


def three_groups(model):
    adamw = {"optimizer": "adamw", "grad_clip": None, "weight_decay": 1e-4}
    return [
        {"name": "backbone", "params": model.body.parameters()},
        {"name": "ecg", "params": model.norm.parameters(), "lr": 1e-3, "schedule": "warmup_cosine", **adamw},
        {"name": "fusion", "params": model.head.parameters(), "lr": 1e-2, **adamw},
    ]


OPTIONS = {
    "epochs": 4,
    "optimizer": "sgd",
    "lr": 1e-2,
    "momentum": 0.99,
    "schedule": "poly",
    "grad_clip": 12.0,
    "warmup_epochs": 1,
    "norm": "batch",
    "dropout": 0.2,
    "checkpoint_every_steps": 2,
    "param_groups": three_groups,
    "best_epoch_smoothing": 0.9,
}


class LoudLoss:
    """A loss that changes from epoch to epoch, as the weight of the ECG's reconstruction does."""

    def __init__(self):
        self.weight, self.told = 1.0, []

    def start_epoch(self, epoch):
        self.weight = (1 + epoch) ** 2
        self.told.append(epoch)

    def __call__(self, outputs, batch, reduce):
        weight = batch["sample_weight"]
        return self.weight * ((outputs[:, 1] - batch["target"]) ** 2 * weight[:, None, None]).mean()


def test_the_best_epoch_is_that_of_the_moving_average(tmp_path):
    """By hand: 0.2, then half the old average and half the new score."""
    result = run(tmp_path, epochs=5, validate=Scores(tmp_path), best_epoch_smoothing=0.5)
    smoothed = [row["val_dice_smoothed"] for row in read_log(tmp_path / "log.csv")]
    assert smoothed == pytest.approx([0.2, 0.55, 0.275, 0.5125, 0.50625])
    assert (result.best_epoch, result.best_score) == (2, pytest.approx(0.55))
    score = read_record(tmp_path / "best" / "score.json")
    assert score == {"epoch": 2, "metric": "dice_smoothed", "score": pytest.approx(0.55)}
    assert [row["val_dice"] for row in read_log(tmp_path / "log.csv")] == list(SCORES)


def test_a_lucky_epoch_does_not_win_over_a_steady_one(tmp_path):
    scores = (0.2, 0.9, 0.7, 0.7, 0.7)
    assert run(tmp_path / "plain", epochs=5, validate=Scores(tmp_path / "plain", scores)).best_epoch == 2
    smoothed = run(tmp_path / "s", epochs=5, validate=Scores(tmp_path / "s", scores), best_epoch_smoothing=0.9)
    assert smoothed.best_epoch == 5
    assert "val_dice_smoothed" not in read_log(tmp_path / "plain" / "log.csv")[0]


def test_an_epoch_without_a_score_leaves_the_average_alone(tmp_path):
    options = {"epochs": 3, "best_epoch_smoothing": 0.5}
    result = run(tmp_path, validate=Scores(tmp_path, (0.2, NAN, 0.6)), **options)
    smoothed = [row["val_dice_smoothed"] for row in read_log(tmp_path / "log.csv")]
    assert smoothed == pytest.approx([0.2, NAN, 0.4], nan_ok=True)
    assert result.best_epoch == 3


def test_three_groups_learn_by_their_own_optimisers_and_schedules(tmp_path):
    run(tmp_path, **OPTIONS)
    log = read_log(tmp_path / "log.csv")
    assert [row["lr_backbone"] for row in log] == pytest.approx([1e-2 * (1 - e / 4) ** 0.9 for e in range(4)])
    assert [row["lr_fusion"] for row in log] == pytest.approx([row["lr_backbone"] for row in log])
    assert log[0]["lr_ecg"] == pytest.approx(1e-3)
    assert log[-1]["lr_ecg"] < 2e-4


def train(out, **options):
    run(out, **OPTIONS, loss=LoudLoss(), validate=Scores(out), **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    train(out)
    return bits(out)


@pytest.mark.parametrize("seed", range(3))
def test_t1_three_groups_and_a_smoothed_score_killed_and_resumed(tmp_path, undisturbed, seed):
    """Killed up to twice at a random sample; optimisers, average, log and weights are those of an undisturbed run."""
    draw, kills = random.Random(seed), 0
    while True:
        data = KilledAt(10, draw.randint(1, 35) if kills < 2 else 0)
        code = Child(lambda: train(tmp_path, data=data, resume=True)).wait()  # noqa: B023
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert bits(tmp_path) == undisturbed


def test_the_loss_is_told_which_epoch_begins(tmp_path):
    loss = LoudLoss()
    run(tmp_path, model=TinyNet(), loss=loss, epochs=3)
    assert loss.told == [0, 1, 2]
