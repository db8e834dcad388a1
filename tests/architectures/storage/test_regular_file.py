"""What is no file, under the name of one."""

from __future__ import annotations

import os
import socket

import pytest

from trifuse.architectures.storage.regular_file import open_regular, require_regular


@pytest.mark.parametrize("read", [open_regular, require_regular])
def test_d31_no_file_is_waited_for(tmp_path, read, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    os.symlink("loop", "loop")
    os.mkdir("folder")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name in ("pipe", "link", "loop", "folder", "socket", "/dev/zero", "absent"):
            with pytest.raises(OSError, match=name) as caught:
                read(name)
            assert caught.value.filename == name


def test_a_file_is_read_through_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    os.symlink("file", tmp_path / "link")
    with open_regular(tmp_path / "link") as stream:
        assert stream.read() == b"content"
