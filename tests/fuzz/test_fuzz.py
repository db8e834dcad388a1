"""No file, however damaged, makes a reader or a command do what it must not; and what once did stays mended."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from random import Random

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import engine  # noqa: E402 - the folder above is where it lies
from engine import Target, fuzz, minimised, replay, with_file  # noqa: E402
from mutators import FORMS, damaged  # noqa: E402
from run import TARGETS  # noqa: E402

from trifuse.kernels.errors import DataError  # noqa: E402

FINDS = sorted(path for path in (HERE / "finds").rglob("*") if path.is_file())
QUICK = [target for target in TARGETS.values() if not target.is_command]


@pytest.mark.parametrize("find", FINDS, ids=lambda find: f"{find.parent.name}-{find.name}")
def test_a_find_is_mended(find):
    assert replay(TARGETS[find.parent.name], find.read_bytes()) is None


@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.name)
def test_readers_take_damaged_files(target):
    inputs = 10 if target.name == "h5" else 50  # of which each is read by a process of its own
    result = fuzz(target, inputs, seed=7)
    assert not result.finds, {what: find.content for what, find in result.finds.items()}
    assert result.inputs == inputs


NO_FILES = {
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "folder": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: path.symlink_to("absent"),
}


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        pytest.param(target, kind, marks=[pytest.mark.slow] if target.is_command and kind != "pipe" else [])
        for target in TARGETS.values()
        for kind in NO_FILES
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_d31_what_is_no_file_is_refused(target, kind, monkeypatch):
    monkeypatch.setattr(engine, "LONGEST_S", 5.0)

    def make(path):
        path.unlink(missing_ok=True)
        NO_FILES[kind](path)

    assert with_file(target, make) is None


@pytest.mark.slow
@pytest.mark.parametrize("target", [each for each in TARGETS.values() if each.is_command], ids=lambda each: each.name)
def test_commands_take_damaged_files(target):
    result = fuzz(target, inputs=20, seed=7)
    assert not result.finds, {what: find.content for what, find in result.finds.items()}


def _target(read, **options):
    return Target("toy", "bytes", "toy.bin", lambda folder: [b"sound content"], read, **options)


def test_every_kind_of_fault_is_found():
    """What the fuzzer calls a find: an error of Python, one without the file's name, an exit code, a dead process."""

    def nameless(path):
        if path.read_bytes() != b"sound content":
            raise DataError("somewhere", "content")

    def python(path):
        path.read_bytes().decode("ascii")

    def dead(path):
        if path.read_bytes() != b"sound content":
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

    assert any("names no file" in what for what in fuzz(_target(nameless), 50, 0).finds)
    assert any("UnicodeDecodeError" in what for what in fuzz(_target(python), 200, 0).finds)
    assert "killed by SIGKILL" in fuzz(_target(dead), 3, 0).finds
    assert "exit code 1" in fuzz(_target(lambda path: 1, is_command=True), 3, 0).finds
    assert not fuzz(_target(lambda path: 3, is_command=True), 50, 0).finds


def test_a_find_is_made_short():
    target = _target(lambda path: path.read_bytes().decode("ascii"))
    (find,) = fuzz(target, 300, 0).finds.values()
    assert len(minimised(target, find)) == 1


def test_the_same_seed_damages_alike():
    for form in FORMS:
        first, second = (damaged(b'{"a": [1, 2]}' * 3, form, Random(5), [b"other"]) for _ in range(2))
        assert first == second
