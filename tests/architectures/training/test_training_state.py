"""What resuming needs: whole, of this network, and on a disk with room for it."""

from __future__ import annotations

import json

import pytest
from tiny_run import StopAt, TinyNet, run

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


def test_c3_damaged_training_state_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, forward=StopAt(2))
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


def test_the_state_keeps_its_names_on_the_disk():
    """Runs of every version are resumed: what the file calls ``step`` is the ``global_step``."""
    state = TrainerState(epoch=2, step_in_epoch=1, global_step=7, best_epoch=1, best_score=0.5, ranks=2)
    saved = state.to_json()
    names = "epoch step_in_epoch step loss_sum largest_gradient_norm seconds best_epoch best_score smoothed_score ranks"
    assert [*saved] == [*names.split(), "loss_scaling"]
    assert saved["step"] == 7
    assert TrainerState.from_json(json.loads(json.dumps(saved))) == state
