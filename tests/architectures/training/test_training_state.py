"""What resuming needs: whole, of this network, and on a disk with room for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import StopAt, TinyNet, bits, run

from trifuse.architectures.storage.best_epoch import BestEpoch
from trifuse.architectures.storage.config_json import config_from_json
from trifuse.architectures.storage.epoch_log import read_log, read_start
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.architectures.training import checkpoint
from trifuse.architectures.training.signals import Interrupted
from trifuse.architectures.training.training_state import FrozenBase, TrainerState
from trifuse.kernels.errors import CheckpointError


def test_training_state_names_its_frozen_base_and_leaves_it_out(tmp_path):
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
        run(tmp_path / "cut", base=base, forward=StopAt(4))
    with pytest.raises(CheckpointError, match=r"expected the frozen weights of .*dinov2.* got .* None"):
        run(tmp_path / "cut", resume=True)
    run(tmp_path / "cut", base=base, resume=True)
    for name in ("best/model.safetensors", "last/training_state.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match=r"learns, but 'body\.' is named as frozen"):
        run(tmp_path / "wrong", base=FrozenBase("body.", "x", "y"))


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return bits(out)


@pytest.mark.parametrize("name", ["training_state.safetensors", "training_state.json", "model.safetensors", "log.json"])
def test_c3_c22_a_damaged_checkpoint_costs_an_interval_and_not_the_run(tmp_path, capsys, whole, name):
    with pytest.raises(Interrupted):
        run(tmp_path, forward=StopAt(5), checkpoint_every_steps=2)
    flip(tmp_path / "last" / name)
    run(tmp_path, resume=True)
    said = capsys.readouterr().out
    assert f"last/{name}: " in said
    assert "last.old/, the one before, takes its place" in said
    assert "resuming after step 4" in said
    assert bits(tmp_path) == whole
    assert not (tmp_path / "last.damaged").exists()


def test_c3_a_damaged_training_state_without_another_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, forward=StopAt(2))
    shutil.rmtree(tmp_path / "last.old")
    for name in ("training_state.safetensors", "model.safetensors"):
        path = tmp_path / "last" / name
        good = path.read_bytes()
        flip(path)
        with pytest.raises(CheckpointError, match=name):
            run(tmp_path, resume=True)
        path.write_bytes(good)
    description = tmp_path / "last" / "training_state.json"
    text = description.read_text()
    flipped = text.replace('"step": 2', '"step": 3')
    for damaged, message in [(text[:50], "the file is damaged"), (flipped, "content has changed since it was written")]:
        description.write_text(damaged)
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path, resume=True)
    description.write_text(text)
    write_record(description, read_record(description) | {"schema_version": 2})
    with pytest.raises(CheckpointError, match="schema_version 1, got 2"):
        run(tmp_path, resume=True)
    description.unlink()
    with pytest.raises(CheckpointError, match="holds no training state"):
        run(tmp_path, resume=True)
    description.write_text(text)
    run(tmp_path, resume=True)


@pytest.mark.parametrize("name", ["score.json", "config.json", "model.safetensors"])
def test_c3_c22_a_damaged_best_epoch_is_replaced_by_less_only_by_force(tmp_path, capsys, name):
    scores = iter([0.1, 0.5, 0.7, 0.2])  # before training, and epochs 1, 2, 3
    options = {"epochs": 3, "validate": lambda model: {"dice": next(scores)}}
    assert run(tmp_path, **options).best_epoch == 2
    flip(tmp_path / "best" / name)
    with pytest.raises(
        CheckpointError, match=rf"best/{name}: .*best\.old: expected epoch 2, .* epoch 1: --force-resume"
    ):
        run(tmp_path, **options, resume=True)
    assert (tmp_path / "best.old").exists()
    result = run(tmp_path, **options, force_resume=True)
    assert (result.best_epoch, result.best_score) == (1, 0.5)
    said = capsys.readouterr().out
    assert f"best/{name}: " in said
    assert "best.old/, the one before, takes its place" in said
    assert BestEpoch.read(tmp_path / "best") == BestEpoch(1, "dice", 0.5)


def test_c3_c22_a_damaged_best_epoch_that_no_state_knows_of_is_reached_again(tmp_path, monkeypatch):
    """Killed between the weights of the second epoch, which are the best, and its state."""
    save = checkpoint.CheckpointManager.save

    def killed_after_the_best(manager, folder, fill):
        saved = save(manager, folder, fill)
        if folder is manager.best and manager.best.previous.exists():
            raise RuntimeError("killed")
        return saved

    def run_with(*scores, **options):
        left = iter(scores)
        return run(epochs=2, validate=lambda model: {"dice": next(left)}, **options)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_with(0.1, 0.5, 0.7, out=whole)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.CheckpointManager, "save", killed_after_the_best)
        with pytest.raises(RuntimeError, match="killed"):
            run_with(0.1, 0.5, 0.7, out=cut)
    flip(cut / "best" / "score.json")
    assert run_with(0.7, out=cut, resume=True).best_epoch == 2
    assert bits(cut) == bits(whole)


@pytest.mark.parametrize("name", ["run.json", "start.json"])
def test_c3_c22_a_flipped_byte_in_what_a_run_says_of_itself_is_named(tmp_path, capsys, name):
    run(tmp_path, epochs=1)
    flip(tmp_path / name)
    if name == "start.json":
        with pytest.raises(CheckpointError, match=name):
            read_start(tmp_path)
        return
    with pytest.raises(CheckpointError, match=r"run\.json: .*; --force-resume takes the recipe that is given"):
        run(tmp_path, epochs=1, resume=True)
    run(tmp_path, epochs=1, force_resume=True)
    assert "run.json is damaged, and written anew" in capsys.readouterr().out
    run(tmp_path, epochs=1, resume=True)


@pytest.mark.parametrize("damage", ["flipped", "a row less", "gone"])
def test_c22_a_log_that_has_changed_is_named_and_left_as_it_is(tmp_path, damage):
    """Its rows are those of the checkpoint, which has their digest; what a kill left behind them does not count."""
    run(tmp_path, epochs=2)
    log = tmp_path / "log.csv"
    good = log.read_bytes()
    shorter = good[: good.index(b"\n2,") + 1]
    bad = {"flipped": good.replace(b"1,3,", b"1,7,"), "a row less": shorter, "gone": None}[damage]
    assert bad != good
    log.unlink() if bad is None else log.write_bytes(bad)
    want = rf"log\.csv: expected 2 rows .*, got {['gone', 'a row less', 'flipped'].index(damage)} .*--force-resume"
    with pytest.raises(CheckpointError, match=want):
        run(tmp_path, epochs=2, resume=True)
    assert (log.read_bytes() if log.exists() else None) == bad
    run(tmp_path, epochs=2, force_resume=True)
    log.write_bytes(good + b"3,9,0.1")
    run(tmp_path, epochs=2, resume=True)
    (tmp_path / "last" / "log.json").unlink()  # as in runs of older versions
    log.write_bytes(good.replace(b"1,3,", b"1,7,"))
    run(tmp_path, epochs=3, resume=True)
    assert [row["epoch"] for row in read_log(log)] == [1, 2, 3]


def test_too_little_room_is_noticed_before_the_first_step(tmp_path, monkeypatch):
    class Usage:
        free = 10

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(CheckpointError, match=r"checkpoints need .* MB more and .* MB are free"):
        run(tmp_path)


def test_the_state_keeps_its_names_on_the_disk():
    """Runs of every version are resumed: what the file calls ``step`` is the ``global_step``."""
    state = TrainerState(epoch=2, step_in_epoch=1, global_step=7, best_epoch=1, best_score=0.5, ranks=2)
    saved = state.to_json()
    names = "epoch step_in_epoch step loss_sum largest_gradient_norm seconds best_epoch best_score smoothed_score ranks"
    assert [*saved] == [*names.split(), "loss_scaling", "compilation"]
    assert saved["step"] == 7
    assert config_from_json(TrainerState, json.loads(json.dumps(saved)), "state") == state
