"""Files that are never half written, on file systems as they are."""

from __future__ import annotations

import errno
import os
import stat
import time

import pytest
from children import Child
from leftovers import leave_half

from trifuse.architectures.storage import atomic_files
from trifuse.architectures.storage.atomic_files import atomic_path, atomic_write, remove_leftovers, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES])
def test_t23_a_folder_that_cannot_be_synced_is_written_to(tmp_path, monkeypatch, number):
    """CIFS and shared folders of virtual machines refuse to sync a folder, Windows to open it."""
    sync = os.fsync

    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, "refused")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_json(tmp_path / "a.json", {"a": 1})
    assert names(tmp_path) == ["a.json"]


def test_t3_a_file_that_the_disk_does_not_take_is_not_written(tmp_path, monkeypatch):
    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == "old"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.EACCES, errno.ENOTSUP])
@pytest.mark.parametrize("write", [atomic_write, atomic_path])
def test_t23_where_no_file_is_renamed_over_another_the_old_one_steps_aside(tmp_path, monkeypatch, number, write):
    rename = os.rename

    def refuse(source, target):
        if os.path.exists(target):
            raise OSError(number, "refused")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    for content in (b"old", b"new"):
        with write(tmp_path / "a.bin") as opened:
            opened.write(content) if write is atomic_write else opened.write_bytes(content)
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_t23_an_old_file_that_stepped_aside_comes_back_if_the_new_one_cannot_follow(tmp_path, monkeypatch):
    rename, refused = os.rename, []

    def refuse(source, target):
        if str(target).endswith("a.json") and not refused:
            refused.append(source)
            raise OSError(errno.EPERM, "refused")
        rename(source, target)

    def refuse_over(source, target):
        raise OSError(errno.EPERM, "refused")

    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(os, "replace", refuse_over)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="refused"):
        write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_t24_what_another_process_is_writing_is_no_leftover(tmp_path):
    """Two that predict into one folder, or fill one cache: the one that starts took the other's file away."""
    out = tmp_path / "p"
    out.mkdir()
    with atomic_write(out / "c0.nii.gz") as stream, atomic_path(out / "c1.npy") as path:
        stream.write(b"x")
        path.write_bytes(b"y")
        assert Child(lambda: remove_leftovers(out)).wait() == 0
        remove_leftovers(out)
    assert (out / "c0.nii.gz").read_bytes() == b"x"
    assert (out / "c1.npy").read_bytes() == b"y"


def test_t24_what_killed_processes_left_is_removed(tmp_path):
    leave_half(tmp_path / "c0.nii.gz")
    folder = leave_half(tmp_path / "c1.npy").with_suffix("")
    folder.mkdir()
    (folder / "c1.npy").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_t24_of_other_machines_what_nobody_has_written_to_for_an_hour_is_removed(tmp_path):
    """Their clocks count: nothing tells whether a process of theirs still runs."""
    old = [tmp_path / name for name in (".trifuse-0-c.nii.gz", ".trifuse-abcdef12-7-0c", ".trifuse-0123456789abcdef")]
    new = [path.with_name(f"{path.name}_new") for path in old]
    for path in (*old, *new):
        path.write_bytes(b"half")
    folder = tmp_path / ".trifuse-abcdef12-7-0d"
    folder.mkdir()
    (folder / "c.npy").write_bytes(b"half")
    for path in (*old, folder):
        os.utime(path, (time.time() - 4000,) * 2)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in (*new, folder))
    os.utime(folder / "c.npy", (time.time() - 4000,) * 2)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in new)


def test_a_process_number_that_was_given_to_another_protects_for_an_hour_at_most(tmp_path, monkeypatch):
    left = leave_half(tmp_path / "a.bin")
    monkeypatch.setattr(atomic_files, "is_running", lambda process: True)
    remove_leftovers(tmp_path)
    assert left.exists()
    os.utime(left, (time.time() - 4000,) * 2)
    remove_leftovers(tmp_path)
    assert not left.exists()


def test_t23_a_read_only_folder_is_named(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No such file or directory") as missing:
        write_json(tmp_path / "nowhere" / "a.json", {})
    assert "nowhere" in missing.value.filename
