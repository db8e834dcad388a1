"""One run per folder, one process at a time, one configuration."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import ClassVar

import pytest
from children import Child
from leftovers import leave_half
from tiny_run import run

from trifuse.architectures.storage.atomic_files import temporary_path
from trifuse.architectures.storage.record import read_record
from trifuse.architectures.training.run_folder import OutputFolderError, append_session, lock_folder, open_run


def test_t17_second_process_is_refused(tmp_path):
    def second():
        with (
            pytest.raises(OutputFolderError, match=f"in use by process {os.getppid()} on .*choose another folder"),
            lock_folder(tmp_path),
        ):
            pass

    with lock_folder(tmp_path):
        assert Child(second).wait() == 0
    with lock_folder(tmp_path):
        pass


def test_t17_a_folder_is_locked_until_the_outer_one_of_two_lets_go(tmp_path):
    """A handle that is closed takes all locks of its process on the file along."""

    def second():
        with pytest.raises(OutputFolderError), lock_folder(tmp_path):
            pass

    with lock_folder(tmp_path):
        with lock_folder(tmp_path / ".." / tmp_path.name):
            pass
        assert Child(second).wait() == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_t17_t23_where_a_file_system_has_no_locks_this_machine_has(tmp_path, monkeypatch, capfd, number):
    """NFS without lockd, Lustre without flock, shares of Windows, some containers."""
    out, lock = tmp_path / "run", fcntl.lockf

    def refuse(file, how):
        if out.as_posix() in file.name:
            raise OSError(number, "refused")
        lock(file, how)

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def second():
        with pytest.raises(OutputFolderError, match="in use"), lock_folder(out):
            pass

    with lock_folder(out):
        assert Child(second).wait() == 0
    with lock_folder(out):
        pass
    assert "this file system has no locks (refused); let nobody else write there" in capfd.readouterr().err


def test_t17_t23_an_operating_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with lock_folder(tmp_path / "run"):
        pass


def test_lock_dies_with_its_process_and_leftovers_are_removed(tmp_path):
    def killed():
        with lock_folder(tmp_path):
            temporary_path(tmp_path / "log.csv").write_text("half")
            os.kill(os.getpid(), 9)

    assert Child(killed).wait() == -9
    with lock_folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


def test_t2_what_a_kill_left_in_the_folders_of_a_run_is_removed(tmp_path):
    """A picture, for example, whose process was killed while it wrote it."""
    figures = tmp_path / "figures" / "test"
    figures.mkdir(parents=True)
    leave_half(figures / "overlays.png")
    with lock_folder(tmp_path):
        assert list(figures.iterdir()) == []


def test_runs_and_repeated_runs_do_not_share_a_folder(tmp_path):
    for name, old, new in (("a", {"repeated": {"a": 1}}, {"config": {"a": 1}}), ("b", {"config": 1}, {"repeated": 1})):
        (tmp_path / name).mkdir()
        open_run(tmp_path / name, old, resume=True, force=False)
        with pytest.raises(OutputFolderError, match=r"holds .* run.*, and cannot hold .* run.*; choose another folder"):
            open_run(tmp_path / name, new, resume=True, force=True)


def test_l4_folder_of_another_run_is_refused(tmp_path):
    assert open_run(tmp_path, {"seed": 1}, resume=True, force=False)[0] == []
    with pytest.raises(OutputFolderError, match="already holds a run; resume it"):
        open_run(tmp_path, {"seed": 1}, resume=False, force=False)
    assert open_run(tmp_path, {"seed": 1}, resume=True, force=False)[0] == []


def test_t14_changed_configuration_is_shown_and_only_accepted_by_force(tmp_path):
    old = {"recipe": {"lr": 0.1, "betas": (0.9, 0.99)}, "config": {"data": {"digest": "a"}, "gone": None}}
    new = {"recipe": {"lr": 0.2, "betas": (0.9, 0.99)}, "config": {"data": {"digest": "b"}, "new": {}}}
    open_run(tmp_path, old, resume=False, force=False)
    with pytest.raises(OutputFolderError) as refusal:
        open_run(tmp_path, new, resume=True, force=False)
    lines = ["recipe.lr: 0.1 -> 0.2", "config.data.digest: 'a' -> 'b'", "config.gone: None -> '(absent)'"]
    assert all(line in str(refusal.value) for line in lines)
    assert "betas" not in str(refusal.value)
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["lr"] == 0.1
    changed, accept = open_run(tmp_path, new, resume=True, force=True)
    assert changed[:2] == lines[:2]
    with pytest.raises(OutputFolderError, match="another configuration"):  # until something has come of it
        open_run(tmp_path, new, resume=True, force=False)
    accept()
    assert open_run(tmp_path, new, resume=True, force=False)[0] == []


def test_an_accepted_description_is_written_once_however_many_checkpoints_follow(tmp_path):
    open_run(tmp_path, {"lr": 1}, resume=False, force=False)
    _, accept = open_run(tmp_path, {"lr": 2}, resume=True, force=True)
    accept()
    (tmp_path / "run.json").unlink()
    accept()
    assert not (tmp_path / "run.json").exists()


def test_a_description_by_an_older_version_is_compared_in_names_of_today(tmp_path):
    def upgrade(old):
        return {"rate": old.get("speed", old.get("rate"))}

    open_run(tmp_path, {"speed": 1}, resume=False, force=False)
    assert open_run(tmp_path, {"rate": 1}, resume=True, force=False, upgrade=upgrade)[0] == []
    with pytest.raises(OutputFolderError, match="rate: 1 -> 2"):
        open_run(tmp_path, {"rate": 2}, resume=True, force=False, upgrade=upgrade)
    changed, accept = open_run(tmp_path, {"rate": 2}, resume=False, force=True, upgrade=upgrade)
    assert changed == ["rate: 1 -> 2"]
    accept()
    assert read_record(tmp_path / "run.json") == {"rate": 2}


@dataclass(frozen=True)
class Settings:
    RENAMED: ClassVar[dict[str, str]] = {"size": "side"}

    side: int = 1


def test_a_run_of_an_older_version_is_resumed_by_names_of_today(tmp_path):
    run(tmp_path, epochs=1, run_config={"size": 1})
    again = {"epochs": 1, "run_config": {"side": 1}, "resume": True}
    with pytest.raises(OutputFolderError, match=r"config\.size: 1 -> "):
        run(tmp_path, **again)
    assert run(tmp_path, config_type=Settings, **again).steps == 3
    with pytest.raises(OutputFolderError, match=r"config\.side: 1 -> 2"):
        run(tmp_path, config_type=Settings, **again | {"run_config": {"side": 2}})


def test_sessions_are_appended(tmp_path):
    append_session(tmp_path, ranks=1)
    append_session(tmp_path, ranks=2)
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [session["ranks"] for session in sessions] == [1, 2]
    assert {"started", "trifuse", "torch"} <= set(sessions[0])


def test_t14_paths_to_one_place_are_one_value(tmp_path, monkeypatch):
    """However they are written, and in lists; names that are no paths differ as ever."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    open_run(tmp_path / "a", {"init": "b", "also": ["a", "b"]}, resume=False, force=False)
    same = {"init": str(tmp_path / "b"), "also": ["./a", "a/../b"]}
    assert open_run(tmp_path / "a", same, resume=True, force=False)[0] == []
    for other in ({**same, "init": "a"}, {**same, "init": "c"}, {**same, "also": ["b", "a"]}, {**same, "also": ["a"]}):
        with pytest.raises(OutputFolderError, match="another configuration"):
            open_run(tmp_path / "a", other, resume=True, force=False)
