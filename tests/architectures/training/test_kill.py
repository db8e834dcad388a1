"""Runs that are killed, in every place where it could hurt, and disks that are full."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from children import Child
from tiny_run import KilledAt, TinyNet, bits, die, run

from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.training.checkpoint import CheckpointFolder, CheckpointManager
from trifuse.kernels.errors import CheckpointError

OPTIONS = {
    "epochs": 4,
    "norm": "batch",
    "dropout": 0.2,
    "ema_decay": 0.9,
    "checkpoint_every_steps": 2,
    "warmup_epochs": 1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    run(out, **OPTIONS)
    return bits(out)


def saved_steps(out: Path) -> int:
    """Return how many steps the checkpoint has that a run goes on from, whatever a kill left; 0 where there is none."""
    names = ["last", *(["last.new", "last.old"] if (out / "last.old").exists() else [])]
    states = (out / name / "training_state.json" for name in names)
    return next((json.loads(path.read_text())["position"]["step"] for path in states if path.exists()), 0)


def steps_at_start(out: Path) -> int:
    """Return how many steps the last session began with: one that began anew would come to the same bits."""
    return json.loads((out / "sessions.jsonl").read_text().splitlines()[-1])["steps_done"]


@pytest.mark.parametrize("seed", range(8))
def test_t1_killed_at_a_random_sample_and_resumed_until_done(tmp_path, whole, seed):
    """Killed up to three times, each time anywhere in what is left; the bits are those of an undisturbed run."""
    draw = random.Random(seed)
    kills = 0
    while True:
        data, saved = KilledAt(10, draw.randint(1, 40) if kills < 3 else 0), saved_steps(tmp_path)
        code = Child(lambda: run(tmp_path, **OPTIONS, data=data, resume=True)).wait()  # noqa: B023
        assert steps_at_start(tmp_path) == saved
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert bits(tmp_path) == whole


def test_t21_threads_change_the_last_digits_at_most(tmp_path):
    def with_threads(threads):
        torch.set_num_threads(threads)
        run(tmp_path / str(threads), epochs=2)

    for threads in (1, 2):
        assert Child(lambda threads=threads: with_threads(threads)).wait() == 0
    one, two = (TinyNet.from_pretrained(tmp_path / str(threads) / "last").state_dict() for threads in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def in_the_way_of(calls: list[str], action) -> None:
    """Let ``action`` run before every call of functions that change the disk."""
    for name in calls:
        module = shutil if name == "rmtree" else os
        original = getattr(module, name)

        def changed(*arguments, _original=original, _name=name, **options):
            action(_name, arguments)
            return _original(*arguments, **options)

        setattr(module, name, changed)


DISK = ["replace", "rename", "rmtree", "mkdir", "unlink"]


SHORT = OPTIONS | {"epochs": 1}


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[dict[str, bytes], list[str]]:
    """The bits of a short run, and every change that it makes to the disk: the function and the last name of a path."""
    out = tmp_path_factory.mktemp("short")
    read, write = os.pipe()

    def note(name, arguments):
        os.write(write, f"{name} {Path(str(arguments[0])).name}\n".encode())

    def child():
        in_the_way_of(DISK, note)
        run(out, **SHORT)

    assert Child(child).wait() == 0
    return bits(out), os.read(read, 60_000).decode().splitlines()


def resumes_after_a_kill(out: Path, expected: dict[str, bytes], change: int) -> None:
    """Kill a run before that change of the disk; the run resumes from a whole checkpoint, and leaves nothing else."""
    left = [change]

    def kill(name, arguments):
        left[0] -= 1
        if left[0] == -1:
            die()

    def killed():
        in_the_way_of(DISK, kill)
        run(out, **SHORT)

    assert Child(killed).wait() == -signal.SIGKILL
    saved = saved_steps(out)
    run(out, **SHORT, resume=True)
    assert steps_at_start(out) == saved, f"change {change}"
    assert bits(out) == expected, f"change {change}"
    assert not [path for path in out.rglob("*") if path.name.startswith(".trifuse-")]
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders - {"best.old"} == {"best", "last", "last.old"}
    shutil.rmtree(out)


def test_t2_killed_at_any_stage_of_writing_a_checkpoint(tmp_path, short):
    """The second one: there is one before it, which a kill must not cost."""
    expected, changes = short
    first, second = [at for at, change in enumerate(changes) if change == "rename last.new"][:2]
    begins = next(at for at in range(first, second) if changes[at] == "mkdir last.new")
    assert second - begins > 10
    for change in range(begins, second + 1):
        resumes_after_a_kill(tmp_path / str(change), expected, change)


@pytest.mark.slow
def test_t2_killed_before_any_change_of_the_disk(tmp_path, short):
    """One run per change; at each a checkpoint is whole, and resuming ends with the bits of an undisturbed run."""
    expected, changes = short
    assert len(changes) > 30
    for change in range(len(changes)):
        resumes_after_a_kill(tmp_path / str(change), expected, change)


def test_t4_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path):
    """What survives a power loss: every file is synced before it gets its name, and its name before the exchange."""
    order = []

    def note(name, arguments):
        target = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[0])
        order.append((name, os.path.relpath(target, tmp_path)))

    def child():
        in_the_way_of(["fsync", "replace", "rename"], note)
        run(tmp_path, epochs=1)
        Path(tmp_path / "order.json").write_text(json.dumps(order))

    assert Child(child).wait() == 0
    order = [tuple(entry) for entry in json.loads((tmp_path / "order.json").read_text())]
    swaps = [at for at, (name, target) in enumerate(order) if name == "rename" and target == "last.new"]
    assert len(swaps) == 2
    for before, swap in zip([0, *swaps], swaps, strict=False):
        assert order[swap + 1] == ("fsync", "."), "the folder is synced after the rename"
        named = [at for at in range(before, swap) if order[at][0] == "replace" and order[at][1].startswith("last.new/")]
        written = [at for at in named if "/.trifuse-" in order[at][1]]
        assert (len(named), len(written)) == (6, 5), "weights, which get their name in two steps, and four more"
        for at in written:
            assert order[at - 1] == ("fsync", order[at][1]), "a file is synced before it gets its name"
        assert ("fsync", "last.new") in order[named[-1] : swap], "names are synced before the checkpoint gets its own"


def test_t2_folder_recovers_from_every_state_a_kill_can_leave(tmp_path):
    def fill(path, text):
        path.mkdir()
        (path / "file").write_text(text)

    for present, expected in [
        ({"x": "old"}, "old"),
        ({"x": "old", "x.new": "half"}, "old"),
        ({"x.old": "old", "x.new": "new"}, "new"),
        ({"x": "new", "x.old": "old"}, "new"),
        ({"x": "new", "x.old": "old", "x.new": "half"}, "new"),
        ({"x.old": "old", "x.damaged": "new"}, "old"),
        ({"x": "old", "x.damaged": "new"}, "old"),
        ({"x.new": "half"}, None),
    ]:
        root = tmp_path / "-".join(present)
        root.mkdir()
        for name, text in present.items():
            fill(root / name, text)
        CheckpointFolder(root / "x").recover()
        left = {path.name: (path / "file").read_text() for path in root.iterdir()}
        before = {"x.old": "old"} if expected == "new" else {}
        assert left == ({"x": expected, **before} if expected else {})


def limit_file_size(limit: int | None) -> None:
    """Let no file of this process grow beyond so many bytes; what a full disk looks like from within."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if limit is None else limit, hard))


def constant_score(model) -> dict[str, float]:
    """With one score for all epochs ``best/`` is written once, and a full disk hits ``last/`` alone."""
    return {"dice": 0.5}


def test_t3_full_disk_keeps_the_old_checkpoint_and_the_next_save_is_another_chance(tmp_path, capfd):
    run(tmp_path / "whole", epochs=6)

    def child():
        saves = []

        def save_on_a_full_disk(self, folder):
            saves.append(folder)
            limit_file_size(1000 if len(saves) in (4, 5) else None)  # first, best, epochs 1, 2, 3, ...
            try:
                save(self, folder)
            finally:
                limit_file_size(None)

        save, TinyNet.save_pretrained = TinyNet.save_pretrained, save_on_a_full_disk
        run(tmp_path / "full", epochs=6, validate=constant_score)

    assert Child(child).wait() == 0
    said = capfd.readouterr().out
    assert said.count("last could not be saved ([Errno 27] File too large); the one before it is kept") == 2
    for name in ("last/model.safetensors", "last/training_state.safetensors"):
        assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_t3_full_disk_ends_the_run_after_three_saves_and_it_resumes_where_it_was_saved(tmp_path):
    run(tmp_path / "whole", epochs=6)

    def child():
        epochs = []

        def fill_the_disk(model):
            epochs.append(model)
            if len(epochs) == 4:  # before training, and epochs 1, 2, 3
                limit_file_size(1000)
            return constant_score(model)

        with pytest.raises(CheckpointError, match=r"last: 3 saves in a row failed.*too large; make room and resume"):
            run(tmp_path / "full", epochs=6, validate=fill_the_disk)
        assert len(epochs) == 6

    assert Child(child).wait() == 0
    position = json.loads((tmp_path / "full" / "last" / "training_state.json").read_text())["position"]
    assert position["epoch"] == 2
    run(tmp_path / "full", epochs=6, resume=True, validate=constant_score)
    assert [row["epoch"] for row in read_log(tmp_path / "full" / "log.csv")] == [1, 2, 3, 4, 5, 6]
    name = "last/model.safetensors"
    assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("failures", [1, 2])
def test_t3_the_final_checkpoint_is_saved_or_the_run_ends_with_an_error(tmp_path, monkeypatch, failures):
    """What fails at the very end is tried again, since no later save makes it good, or the run is not done."""
    run(tmp_path / "whole", epochs=2, validate=constant_score)
    saves, save = [], TinyNet.save_pretrained

    def save_on_a_full_disk(self, folder):
        saves.append(folder)
        if 4 <= len(saves) < 4 + failures:  # first, best, epochs 1, 2, and 2 again
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(TinyNet, "save_pretrained", save_on_a_full_disk)
    if failures == 2:
        with pytest.raises(
            CheckpointError, match="last: the final checkpoint could not be saved; make room and resume"
        ):
            run(tmp_path / "full", epochs=2, validate=constant_score)
    run(tmp_path / "full", epochs=2, validate=constant_score, resume=failures == 2)
    assert bits(tmp_path / "full") == bits(tmp_path / "whole")


def test_a_best_epoch_that_could_not_be_saved_is_not_called_best(tmp_path):
    checkpoints = CheckpointManager(tmp_path, say=lambda text: None)

    def fails(folder):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    assert checkpoints.save(checkpoints.best, lambda folder: (folder / "good").write_text("")) is True
    assert checkpoints.save(checkpoints.best, fails) is False
    assert [path.name for path in checkpoints.best.path.iterdir()] == ["good"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert checkpoints.save(checkpoints.last, lambda folder: None) is True
    assert checkpoints.save(checkpoints.last, fails) is False
    assert checkpoints.save(checkpoints.best, fails) is False
    with pytest.raises(CheckpointError, match=r"3 saves in a row failed.*No space left.*make room and resume"):
        checkpoints.save(checkpoints.last, fails)


def test_a_run_whose_folder_was_moved_away_is_not_told_to_make_room(tmp_path):
    checkpoints = CheckpointManager(tmp_path / "moved", say=lambda text: None)
    with pytest.raises(CheckpointError, match=r"last: the final .*; the run's folder has gone from there: resume"):
        checkpoints.save_final(lambda folder: None)
    assert checkpoints.save(checkpoints.last, lambda folder: None) is False
    with pytest.raises(CheckpointError, match=r"3 saves in a row failed.*No such file.*the run's folder has gone"):
        checkpoints.save(checkpoints.last, lambda folder: None)


def test_c20_a_folder_that_cannot_be_written_fails_before_the_first_step(tmp_path, monkeypatch):
    steps = []

    def refuse(self, folder):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(TinyNet, "save_pretrained", refuse)
    with pytest.raises(CheckpointError, match=r"last: cannot be written.*Read-only file system"):
        run(tmp_path, forward=lambda model, batch: steps.append(1))
    assert steps == []
