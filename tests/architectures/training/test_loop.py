"""What a whole run does, in this process."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from children import run_ranks
from recording_logger import RecordingLogger
from tiny_run import EVERYTHING, Squares, StopAt, TinyConfig, TinyNet, bits, run, validate

from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.training.parameter_groups import ParameterGroup
from trifuse.architectures.training.schedules import warmup_cosine
from trifuse.architectures.training.signals import Interrupted
from trifuse.kernels.errors import BackendError, DataError, TrifuseError


def test_it_learns_and_leaves_what_it_promises(tmp_path, capsys):
    model = TinyNet()
    frozen = copy.deepcopy(model.encoder.state_dict())
    result = run(
        tmp_path, model=model, epochs=25, lr=5e-2, describe=lambda model: {"head_bias": float(model.head.bias[0])}
    )
    log = read_log(tmp_path / "log.csv")
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert result.best_score > 0.6
    assert result.best_score == max(row["val_dice"] for row in log)
    assert log[result.best_epoch - 1]["val_dice"] == result.best_score
    assert [row["epoch"] for row in log] == list(range(1, 26))
    assert [row["step"] for row in log] == [3 * epoch for epoch in range(1, 26)]
    assert result.steps == 75
    assert log[-1]["head_bias"] == pytest.approx(float(model.head.bias[0].detach()))
    best = TinyNet.from_pretrained(tmp_path / "best").eval()
    assert validate(best)["dice"] == result.best_score
    assert json.loads((tmp_path / "best" / "score.json").read_text())["epoch"] == result.best_epoch
    for name, tensor in TinyNet.from_pretrained(tmp_path / "last").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("before training: val_dice")
    assert len(lines) == 26
    assert lines[-1].startswith("epoch 25, step 75, lr ")


def test_loggers_get_the_configuration_and_every_epoch(tmp_path):
    loggers = RecordingLogger("one"), RecordingLogger("two")
    with pytest.raises(Interrupted):
        run(tmp_path, forward=StopAt(8), loggers=loggers)  # in the third epoch, of three steps each
    run(tmp_path, resume=True, loggers=loggers)
    described = json.loads((tmp_path / "run.json").read_text())
    for logger in loggers:
        starts = [call[1:] for call in logger.calls if call[0] == "start"]
        assert [(folder, epochs_done) for folder, _, epochs_done in starts] == [(tmp_path, 0), (tmp_path, 2)]
        for _, configuration, _ in starts:
            assert json.loads(json.dumps(configuration)).items() <= described.items()
            assert configuration["recipe"]["lr"] == 1e-2
        others = [call for call in logger.calls if call[0] != "start"]
        assert others == [("log", 1), ("log", 2), ("close", False), ("log", 3), ("close", True)]


def test_a_logger_that_fails_costs_a_run_nothing(tmp_path, capsys):
    run(tmp_path / "whole")
    run(tmp_path / "run", loggers=[RecordingLogger("broken", fails_at=2)])
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    assert capsys.readouterr().out.count("broken failed") == 1
    *_, note = (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()
    assert json.loads(note)["said"].startswith("broken failed")


def test_loggers_are_told_on_the_first_rank_alone(tmp_path):
    def work():
        logger = RecordingLogger()
        run(tmp_path / "run", epochs=1, loggers=[logger])
        (tmp_path / os.environ["RANK"]).write_text(str(len(logger.calls)))

    assert run_ranks(work) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3", "0"]


def test_t15_learning_rate_follows_the_schedule(tmp_path):
    run(tmp_path, epochs=4, warmup_epochs=2, min_lr=1e-3)
    rates = [row["lr"] for row in read_log(tmp_path / "log.csv")]
    assert rates == [warmup_cosine(3 * epoch - 1, 12, 6, 1e-2, 1e-3) for epoch in range(1, 5)]


@pytest.mark.parametrize("schedule", ["warmup_cosine", "poly", "constant"])
@pytest.mark.parametrize("steps_before", [2, 3, 7], ids=["in the warm-up", "between epochs", "in the third epoch"])
def test_t15_learning_rate_goes_on_with_the_schedule(tmp_path, monkeypatch, schedule, steps_before):
    """At every step, and as the log has it: a run that was stopped has the rates of one that was not."""
    taken: list[float] = []
    set_rate = ParameterGroup.set_learning_rate

    def note(group, *arguments):
        taken.append(set_rate(group, *arguments))
        return taken[-1]

    monkeypatch.setattr(ParameterGroup, "set_learning_rate", note)
    options = {"epochs": 4, "schedule": schedule, "warmup_epochs": 1, "min_lr": 1e-3}
    run(tmp_path / "whole", **options)
    whole = taken[:]
    taken.clear()
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", **options, forward=StopAt(steps_before))
    run(tmp_path / "cut", **options, resume=True)
    assert taken == whole
    logs = [[row["lr"] for row in read_log(tmp_path / name / "log.csv")] for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert len({*whole}) > 1 or schedule == "constant"


def test_same_arguments_same_bits_and_the_callers_random_state_is_left_alone(tmp_path):
    for name in "ab":
        torch.manual_seed(ord(name))
        model = TinyNet(TinyConfig(norm="batch", dropout=0.2))
        before = torch.random.get_rng_state()
        run(tmp_path / name, **EVERYTHING, model=model)
        assert torch.equal(torch.random.get_rng_state(), before)
    run(tmp_path / "c", **EVERYTHING, seed=43)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    assert bits(tmp_path / "a")["last/model.safetensors"] != bits(tmp_path / "c")["last/model.safetensors"]


def test_every_forward_pass_of_every_rank_draws_its_own_numbers(tmp_path):
    """As dropout does: micro-batches, steps and epochs share none, nor do ranks."""

    def work():
        drawn = tmp_path / os.environ["RANK"]

        def forward(model, batch):
            with open(drawn, "a") as file:
                print(float(torch.rand(())), file=file)
            return model(batch["image"])

        run(tmp_path / "run", accumulate=2, epochs=2, forward=forward)

    assert run_ranks(work) == [0, 0]
    passes = 2 * (2 + 2 + 1)
    drawn = [(tmp_path / rank).read_text().split() for rank in "01"]
    assert [len(of_rank) for of_rank in drawn] == [passes, passes]
    assert len({*drawn[0], *drawn[1]}) == 2 * passes


def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        run(tmp_path / str(workers), workers=workers, epochs=2, dropout=0.2)
    assert bits(tmp_path / "0") == bits(tmp_path / "2")


def test_evaluation_uses_the_average_and_training_goes_on_with_the_raw_weights(tmp_path):
    """With decay (1 + n) / (10 + n): the first two averages, by hand."""
    seen = []
    model = TinyNet()
    start = model.head.bias.detach().clone()

    def look(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(model.head.bias.detach().clone())
        return validate(model)

    run(tmp_path, model=model, epochs=1, batch_size=10, ema_decay=0.999, validate=look)
    raw = TinyNet.from_pretrained(tmp_path / "last").head.bias
    assert torch.equal(model.head.bias, raw)
    assert torch.equal(seen[0], start)
    torch.testing.assert_close(seen[1], start + 9 / 11 * (raw - start))
    assert torch.equal(TinyNet.from_pretrained(tmp_path / "best").head.bias, seen[1])


def test_t19_validation_without_the_deciding_score_or_without_a_value_fails_before_the_first_step(tmp_path):
    steps = []
    for number, (metrics, message) in enumerate(
        [
            ({"loss": 1.0}, r"no 'val_dice' to choose .* what it has: val_loss"),
            ({"dice": float("nan")}, "validation set empty"),
        ]
    ):
        with pytest.raises(TrifuseError, match=message):
            run(tmp_path / str(number), validate=lambda model: metrics, forward=lambda m, b: steps.append(b))  # noqa: B023
    assert steps == []


def test_an_epoch_without_a_score_is_not_the_best(tmp_path):
    scores = iter([0.0, float("nan"), 0.3, float("nan")])
    assert run(tmp_path, validate=lambda model: {"dice": next(scores)}).best_epoch == 2


def test_data_errors_pass_through(tmp_path):
    class Bad(Squares):
        def __getitem__(self, key):
            raise KeyError("image")

    with pytest.raises(DataError, match=r"sample . of epoch 0: KeyError"):
        run(tmp_path, data=Bad(4))


def test_l7_a_device_that_is_not_there(tmp_path):
    count = torch.cuda.device_count()
    with pytest.raises(BackendError, match=f"needs GPU number {count}; found {count} GPUs; use device 'cpu'"):
        run(tmp_path, device=f"cuda:{count}")


def test_groups_have_their_own_columns(tmp_path):
    def groups(model):
        return [
            {"name": "body", "params": model.body.parameters(), "optimizer": "sgd", "schedule": "poly"},
            {"name": "rest", "params": [*model.norm.parameters(), *model.head.parameters()], "schedule": "constant"},
        ]

    run(tmp_path / "whole", param_groups=groups)
    log = read_log(tmp_path / "whole" / "log.csv")
    assert [row["lr_body"] for row in log] == [1e-2 * (1 - epoch / 3) ** 0.9 for epoch in range(3)]
    assert [row["lr_rest"] for row in log] == [1e-2] * 3
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", param_groups=groups, forward=StopAt(5))
    run(tmp_path / "cut", param_groups=groups, resume=True)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
