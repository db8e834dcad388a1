"""What a whole run does, in this process."""

from __future__ import annotations

import copy
import json
import signal

import pytest
import torch
from children import Child
from tiny_run import Squares, StopAt, TinyConfig, TinyNet, bits, recipe, run, validate
from torch import nn

from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.training import checkpoint
from trifuse.architectures.training.batches import plan_epoch
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.architectures.training.schedules import warmup_cosine
from trifuse.architectures.training.signals import Interrupted
from trifuse.kernels.errors import BackendError, CheckpointError, DataError, NumericError, TrifuseError

EVERYTHING = {
    "norm": "batch",
    "dropout": 0.2,
    "ema_decay": 0.9,
    "accumulate": 2,
    "grad_clip": 0.3,
    "warmup_epochs": 0.5,
}


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
    assert lines[0].startswith("before training: dice")
    assert len(lines) == 26
    assert lines[-1].startswith("epoch 25, step 75, lr ")


def test_two_steps_are_the_textbook_steps(tmp_path):
    """Two epochs of one step equal two steps written out by hand, weight decay and clipping included."""
    model = TinyNet()
    expected = copy.deepcopy(model)
    settings = {"epochs": 2, "batch_size": 10, "grad_clip": 0.1, "lr": 0.1, "schedule": "constant"}
    run(tmp_path, model=model, **settings)
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], 0.1, weight_decay=1e-2)
    for epoch in range(2):
        samples = [Squares(10)[key] for key in plan_epoch(10, recipe(**settings), epoch, 0, 1)[0][0].keys]
        logits = expected(torch.stack([s["image"] for s in samples]))
        target = torch.stack([s["target"] for s in samples])
        p = logits.softmax(1)[:, 1]
        dice = (2 * (p * target).sum() + 1e-5) / (p.sum() + target.sum() + 1e-5)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(logits, target) - dice).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_checkpoints_within_an_epoch(tmp_path):
    steps = []

    def fails(model, batch):
        steps.append(batch)
        if len(steps) == 6:
            raise RuntimeError("out of memory")
        return model(batch["image"])

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, checkpoint_every_steps=2, step=fails)
    position = json.loads((tmp_path / "last" / "training_state.json").read_text())["position"]
    assert (position["step"], position["epoch"], position["step_in_epoch"]) == (4, 1, 1)


def test_t15_learning_rate_follows_the_schedule(tmp_path):
    run(tmp_path, epochs=4, warmup_epochs=2, min_lr=1e-3)
    rates = [row["lr"] for row in read_log(tmp_path / "log.csv")]
    assert rates == [warmup_cosine(3 * epoch - 1, 12, 6, 1e-2, 1e-3) for epoch in range(1, 5)]


@pytest.mark.parametrize("length", [8, 10, 11])
def test_accumulation_4x1_equals_1x4(tmp_path, length):
    """With a loss that is a mean over samples; the last step is uneven, and so is the last micro-batch."""
    models = TinyNet(), TinyNet(), TinyNet()
    for model, accumulate in zip(models, (1, 2, 4), strict=True):
        run(tmp_path / str(accumulate), model=model, accumulate=accumulate, batch_dice=False, length=length)
    for name, tensor in models[0].state_dict().items():
        for other in models[1:]:
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    losses = [read_log(tmp_path / str(a) / "log.csv")[-1]["loss"] for a in (1, 2, 4)]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


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


def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        run(tmp_path / str(workers), workers=workers, epochs=2, dropout=0.2)
    assert bits(tmp_path / "0") == bits(tmp_path / "2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(("call", "step"), [(1, 1), (4, 2), (5, 3)])
def test_t5_a_signal_stops_at_the_next_step_and_resuming_changes_nothing_t20(tmp_path, call, step, number):
    """Micro-batches per step: 2, 2, 1; mid-step, mid-epoch, and the last step of an epoch."""
    run(tmp_path / "whole", **EVERYTHING)
    with pytest.raises(Interrupted, match=rf"stopped by {number.name} after step {step}; resume"):
        run(tmp_path / "cut", **EVERYTHING, step=StopAt(call, number))
    position = json.loads((tmp_path / "cut" / "last" / "training_state.json").read_text())["position"]
    assert position["step"] == step
    run(tmp_path / "cut", **EVERYTHING, resume=True)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
    assert signal.getsignal(number) is not None


def test_t5_second_signal_ends_at_once(tmp_path):
    child = Child(lambda: run(tmp_path, step=StopAt(2, signal.SIGTERM, times=2)))
    assert child.wait() == -signal.SIGTERM
    assert json.loads((tmp_path / "last" / "training_state.json").read_text())["position"]["step"] == 0


def test_t5_an_echo_under_torchrun_is_not_a_second_signal(tmp_path):
    child = Child(lambda: run(tmp_path, step=StopAt(2, signal.SIGTERM, times=2)), TORCHELASTIC_RUN_ID="1")
    assert child.wait() == 75


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run(tmp_path)
    assert run(tmp_path, resume=True, step=None) == first


def test_t14_another_recipe_or_configuration_is_refused_and_forced(tmp_path, capsys):
    run(tmp_path, epochs=1, run_config={"digest": "a"})
    for changes in ({"lr": 0.5}, {"epochs": 2}, {"batch_size": 2}, {"run_config": {"digest": "b"}}, {"length": 9}):
        with pytest.raises(OutputFolderError, match=r"another configuration:\n  .* -> "):
            run(tmp_path, **{"epochs": 1, "run_config": {"digest": "a"}, "resume": True} | changes)
    with pytest.raises(OutputFolderError, match="already holds a run"):
        run(tmp_path, epochs=1, run_config={"digest": "a"})
    capsys.readouterr()
    assert run(tmp_path, epochs=2, run_config={"digest": "a"}, force_resume=True).steps == 6
    assert "changed configuration: recipe.epochs: 1 -> 2" in capsys.readouterr().out
    assert [row["epoch"] for row in read_log(tmp_path / "log.csv")] == [1, 2]


def test_what_does_not_change_the_result_may_change(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, step=StopAt(2))
    run(tmp_path, resume=True, checkpoint_every_steps=1, workers=1)
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [(s["steps_done"], s["workers"]) for s in sessions] == [(0, 0), (2, 1)]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_t6_nan_in_a_sample_stops_and_is_found(tmp_path, ema_decay):
    options = {"checkpoint_every_steps": 1, "epochs": 1, "batch_size": 1, "ema_decay": ema_decay}
    at = [key[0][2] for key in (s[0].keys for s in plan_epoch(10, recipe(**options), 0, 0, 1))].index(7)
    with pytest.raises(NumericError, match=rf"loss is not finite at step {at}; .*input 'image'.*\[7\].*case_7.*crash"):
        run(tmp_path, poison=7, **options)
    (path,) = (tmp_path / "crash").iterdir()
    report = json.loads(path.read_text())
    assert report["sample_keys"] == [[42, 0, 7]]
    assert report["case_ids"] == ["case_7"]
    assert json.loads((tmp_path / "last" / "training_state.json").read_text())["position"]["step"] == at
    assert all(p.isfinite().all() for p in TinyNet.from_pretrained(tmp_path / "last").parameters())


class _Burst(nn.Module):
    def forward(self, x):
        return torch.where(x == x.max(), torch.inf, x)


def test_t6_the_first_module_that_is_not_finite_is_named(tmp_path):
    model = TinyNet()
    model.norm = nn.Sequential(nn.Identity(), _Burst())
    with pytest.raises(NumericError, match=r"first seen in the output of module 'norm\.1' \(_Burst\)"):
        run(tmp_path, model=model)


def test_t6_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    model = TinyNet()

    def root_of_zero(model, batch):
        return model(batch["image"]) + (model.head.bias[0] * 0).abs().sqrt()

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericError, match=r"at step 0; first seen in the gradient of 'head.bias'"):
        run(tmp_path, model=model, step=root_of_zero)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class _Overflow(torch.autograd.Function):
    """The identity, whose gradient overflows a bounded number of times."""

    left = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        _Overflow.left -= 1
        return gradient * (torch.inf if _Overflow.left >= 0 else 1)


@pytest.mark.parametrize(("overflows", "fails"), [(3, False), (20, False), (21, True)])
def test_t7_fp16_skips_are_counted_and_bounded(tmp_path, overflows, fails):
    _Overflow.left = overflows
    options = {"precision": "fp16", "epochs": 10, "step": lambda m, batch: _Overflow.apply(m(batch["image"]).float())}
    if fails:
        with pytest.raises(NumericError, match="gradient is not finite at step 20"):
            run(tmp_path, **options)
    else:
        run(tmp_path, **options)
        state = json.loads((tmp_path / "last" / "training_state.json").read_text())["position"]["loss_scaling"]
        assert state["scale"] == 65536 / 2**overflows
        assert state["skipped_in_a_row"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_is_of_the_forward_pass_alone(tmp_path, precision):
    seen = []

    def forward(model, batch):
        outputs = model(batch["image"])
        seen.append(outputs.dtype)
        return outputs

    model = TinyNet()
    run(tmp_path / "whole", model=model, precision=precision, step=forward)
    assert set(seen) == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", precision=precision, step=StopAt(4))
    run(tmp_path / "cut", precision=precision, resume=True)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")


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


def test_t19_validation_without_the_monitored_metric_or_without_a_value_fails_before_the_first_step(tmp_path):
    steps = []
    for number, (metrics, message) in enumerate(
        [({"loss": 1.0}, r"no 'dice' to choose .* it has \['loss'\]"), ({"dice": float("nan")}, "validation set empty")]
    ):
        with pytest.raises(TrifuseError, match=message):
            run(tmp_path / str(number), validate=lambda model: metrics, step=lambda m, b: steps.append(b))  # noqa: B023
    assert steps == []


def test_an_epoch_without_a_score_is_not_the_best(tmp_path):
    scores = iter([0.0, float("nan"), 0.3, float("nan")])
    assert run(tmp_path, validate=lambda model: {"dice": next(scores)}).best_epoch == 2


def test_training_state_names_its_frozen_base_and_leaves_it_out(tmp_path):
    from trifuse.architectures.training.training_state import FrozenBase

    base = FrozenBase("encoder.", "dinov2.safetensors", "ab" * 32)
    run(tmp_path / "whole", base=base)
    run(tmp_path / "complete")
    for best in (tmp_path / "whole" / "best", tmp_path / "complete" / "best"):
        assert TinyNet.from_pretrained(best)
    last = tmp_path / "whole" / "last"
    assert not (last / "model.safetensors").exists()
    assert b"encoder" not in (last / "training_state.safetensors").read_bytes()
    assert json.loads((last / "training_state.json").read_text())["frozen_base"]["sha256"] == "ab" * 32
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", base=base, step=StopAt(4))
    with pytest.raises(CheckpointError, match=r"expected the frozen weights of .*dinov2.* got .* None"):
        run(tmp_path / "cut", resume=True)
    run(tmp_path / "cut", base=base, resume=True)
    for name in ("best/model.safetensors", "last/training_state.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match=r"learns, but 'body\.' is named as frozen"):
        run(tmp_path / "wrong", base=FrozenBase("body.", "x", "y"))


def test_c3_damaged_training_state_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, step=StopAt(2))
    for name in ("training_state.safetensors", "model.safetensors"):
        path = tmp_path / "last" / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=name):
            run(tmp_path, resume=True)
        path.write_bytes(good)
    description = tmp_path / "last" / "training_state.json"
    text = description.read_text()
    newer = text.replace('"schema_version": 1', '"schema_version": 2')
    for damaged, message in [(text[:50], "not valid JSON"), (newer, "schema_version 1, got 2")]:
        description.write_text(damaged)
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path, resume=True)
    description.unlink()
    with pytest.raises(CheckpointError, match="holds no training state"):
        run(tmp_path, resume=True)
    description.write_text(text)
    run(tmp_path, resume=True)


def test_too_little_room_is_noticed_before_the_first_step(tmp_path, monkeypatch):
    class Usage:
        free = 10

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(CheckpointError, match=r"checkpoints need .* MB more and .* MB are free"):
        run(tmp_path)


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


def test_the_network_is_told_which_epoch_begins_or_goes_on(tmp_path):
    class Listening(TinyNet):
        def __init__(self):
            super().__init__()
            self.told = []

        def start_epoch(self, epoch):
            self.told.append(epoch)

    model = Listening()
    with pytest.raises(Interrupted):
        run(tmp_path, model=model, step=StopAt(5))
    assert model.told == [0, 1]
    model = Listening()
    run(tmp_path, model=model, resume=True)
    assert model.told == [1, 2]


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
        run(tmp_path / "cut", param_groups=groups, step=StopAt(5))
    run(tmp_path / "cut", param_groups=groups, resume=True)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
